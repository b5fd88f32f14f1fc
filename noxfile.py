"""The checks, each in its own environment: ``nox`` runs all of them, ``nox -s tests`` one.

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
def fuzz(session: nox.Session) -> None:
    """Fuzz what reads masks and relevance, guided by coverage; arguments after -- go to libFuzzer."""
    session.install("-c", "constraints.txt", "-e", ".[test]", "atheris>=3")
    arguments = session.posargs or ["-runs=100000"]
    session.run("python", "tests/fuzz/fuzz_tensors.py", *arguments, env={**ENVIRONMENT, "PYTHONPATH": "."})
