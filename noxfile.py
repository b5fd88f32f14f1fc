"""The checks, each in its own environment: ``nox`` runs those of every day, ``nox -s NAME`` one, ``nox -l`` lists all.

pip and virtualenv rather than uv, so that constraints.txt and the machine's own package settings apply.
"""

import os

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
