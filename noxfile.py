"""The checks, each in its own environment: ``nox`` runs all of them, ``nox -s tests`` one.

pip and virtualenv rather than uv, so that constraints.txt and the machine's own package settings apply.
"""

import os
import shutil

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

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@nox.session(venv_backend="virtualenv")
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session(venv_backend="virtualenv")
def browser(session: nox.Session) -> None:
    """Run the report's tests in a real browser, Debian's chromium where there is none yet; a skip is a failure here."""
    if not _browser():
        # As root or not at all; whatever comes of it, what counts is whether a browser is there.
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            if shutil.which("apt-get"):
                session.run("apt-get", *command, external=True, success_codes=range(256))
        if not _browser():
            session.error(
                f"no browser: install one of {', '.join(BROWSERS)}, such as Debian's package chromium, as root"
            )
    session.install("-c", "constraints.txt", "-e", ".[test]")
    needed = {**ENVIRONMENT, "STEREOCLINIC_NEEDS_BROWSER": "1"}
    session.run("pytest", "tests/evaluation/test_page_in_a_browser.py", *session.posargs, env=needed)


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


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
