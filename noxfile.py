"""The checks, each in its own environment: ``nox`` runs those of every day, ``nox -s NAME`` one, ``nox -l`` lists all.

pip and virtualenv rather than uv, so that constraints.txt and the machine's own package settings apply.
"""

import os
import re
import shutil
import tarfile
import zipfile
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

#: A process of tests per core; those of a file stay together, for what they share is made once a process. Files come in
#: their own order: by default those of few tests come last, which start processes and take longest, and one waits.
SPREAD = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@nox.session(venv_backend="virtualenv")
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", *SPREAD, *session.posargs, env=ENVIRONMENT)


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
    """Check style, format and the order of imports; the pre-commit hooks run the first two commands."""
    session.install(
        "-c", "constraints.txt", *nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["lint"]
    )
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(("toolkit", "cli"))})


@nox.session(venv_backend="virtualenv")
def typecheck(session: nox.Session) -> None:
    """Check types."""
    session.install("-c", "constraints.txt", "-e", ".[typecheck]")
    session.run("mypy")


@nox.session(venv_backend="virtualenv")
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning, such as a link that leads nowhere, fails."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    # The reference of the commands is made from the command line itself, which needs these and no torch.
    light = [each for each in project["dependencies"] if each.startswith(("typer", "rich", "pydantic", "lazy-loader"))]
    session.install("-c", "constraints.txt", *light, *project["optional-dependencies"]["docs"])
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="virtualenv")
def minimums(session: nox.Session) -> None:
    """Run quick tests, or those after --, on the lowest versions that pyproject.toml declares."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lowest = [re.sub(r">=([^,]+).*", r"==\1", each) for each in wanted]
    path = Path(session.create_tmp()) / "lowest.txt"
    path.write_text("\n".join(lowest) + "\n")
    session.install("-c", str(path), "-e", ".[test]")
    quick = (
        "tests/test_axes.py",
        "tests/test_prompts.py",
        "tests/test_prompt_files.py",
        "tests/sns",
        "tests/evaluation/test_bias.py",
        "tests/cli",
    )
    session.run("pytest", *SPREAD, *(session.posargs or ("-m", "not slow", *quick)), env=ENVIRONMENT)


@nox.session(venv_backend="virtualenv")
def coverage(session: nox.Session) -> None:
    """Say which lines the tests run, those of the commands that they start too; a report, no gate."""
    session.install("-c", "constraints.txt", "-e", ".[test]", "coverage>=7.10")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *SPREAD, *session.posargs, env=ENVIRONMENT)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session(venv_backend="virtualenv")
def wheel(session: nox.Session) -> None:
    """Build the source distribution, the wheel from that, and run the wheel where the sources are not."""
    folder = Path(session.create_tmp()).resolve()
    for old in (*folder.glob("*.tar.gz"), *folder.glob("*.whl")):
        old.unlink()
    session.install("-c", "constraints.txt", "hatchling")
    session.run("hatchling", "build", "-t", "sdist", "-d", str(folder))
    (sources,) = folder.glob("*.tar.gz")
    session.run("pip", "wheel", "-q", "-c", "constraints.txt", "--no-deps", "-w", str(folder), str(sources))
    (built,) = folder.glob("*.whl")

    with tarfile.open(sources) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(built) as archive:
        held = set(archive.namelist())
    roots = {"toolkit": "toolkit/stereoclinic", "cli": "cli/stereo_cli"}
    ours = {
        path.relative_to(root).as_posix(): path.as_posix()
        for root, package in roots.items()
        for path in Path(package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    if lost := sorted(path for name, path in ours.items() if name not in held or path not in packed):
        session.error(f"not in the wheel or not in the source distribution: {', '.join(lost)}")
    for name in ("prompts/axes/gender.toml", "report/templates/report.html", "portraits/weights/unet/config.json"):
        if f"stereoclinic/{name}" not in held:  # and so does this look in the right place
            session.error(f"the wheel lacks {name}")
    if strange := sorted(name for name in held if name not in ours and ".dist-info/" not in name):
        session.error(f"the wheel holds more than the packages: {', '.join(strange)}")
    if any(name.startswith("benchmarks/worlds/harbour/") for name in packed):
        session.error("the source distribution holds the weights of the second world, which are for its repository")

    session.install("-c", "constraints.txt", "--force-reinstall", "--no-deps", str(built))
    session.install("-c", "constraints.txt", str(built))
    with session.chdir(folder):
        for command in (["--help"], ["locate", "--dry-run"], ["bench", "--dry-run"]):  # the last two open the weights
            session.run("stereo", *command, env={**ENVIRONMENT, "PYTHONPATH": ""})


@nox.session(venv_backend="virtualenv")
def fuzz(session: nox.Session) -> None:
    """Fuzz every reader of files, in more than 20,000 cases; arguments after -- go to tests/fuzz/run.py."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    quiet = {"PYTHONPATH": ".", "PYTHONWARNINGS": "ignore"}
    quiet |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "critical"}
    session.run("python", "-m", "tests.fuzz.run", *session.posargs, env={**ENVIRONMENT, **quiet})
