"""The checks, each in its own environment: ``nox`` runs those of every day, ``nox -s NAME`` one, ``nox -l`` lists all.

pip and virtualenv rather than uv, so that constraints.txt and the machine's own package settings apply.
"""

import os
import re
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typecheck", "tests"]

ENVIRONMENT = {
    # Several processes that each start a thread per core slow one another manyfold.
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing in the tests may need the network.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
}


@nox.session(venv_backend="virtualenv")
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session(venv_backend="virtualenv")
def lint(session: nox.Session) -> None:
    """Check style and format; the pre-commit hooks run the same two commands."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="virtualenv")
def typecheck(session: nox.Session) -> None:
    """Check types."""
    session.install("-c", "constraints.txt", "-e", ".[typecheck]")
    session.run("mypy")


@nox.session(venv_backend="virtualenv")
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning, such as a link that leads nowhere, fails."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    # The reference of the commands is made from the command line itself, which needs these two and no torch.
    light = [each for each in project["dependencies"] if each.startswith(("typer", "rich"))]
    session.install("-c", "constraints.txt", *light, *project["optional-dependencies"]["docs"])
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="virtualenv")
def minimums(session: nox.Session) -> None:
    """Run a quick part of the tests on the lowest versions that pyproject.toml declares; arguments after -- replace it."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lowest = [re.sub(r">=([^,]+).*", r"==\1", each) for each in wanted]
    path = Path(session.create_tmp()) / "lowest.txt"
    path.write_text("\n".join(lowest) + "\n")
    session.install("-c", str(path), "-e", ".[test]")
    quick = ("tests/test_axes.py", "tests/test_prompts.py", "tests/sns", "tests/evaluation/test_bias.py", "tests/cli")
    session.run("pytest", *(session.posargs or ("-m", "not slow", *quick)), env=ENVIRONMENT)


@nox.session(venv_backend="virtualenv")
def coverage(session: nox.Session) -> None:
    """Say which lines the tests run, those of the commands that they start too; a report, no gate."""
    session.install("-c", "constraints.txt", "-e", ".[test]", "coverage>=7.10")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs, env=ENVIRONMENT)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")
