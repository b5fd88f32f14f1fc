"""What it costs to start a command, against importing torch alone.

    python benchmarks/speed/startup.py --json startup.json

Each is a process of its own; they run in turn, torch alone before each. CPU seconds are those of user and system, which
other work on the machine changes less than the time on the clock. The first rows are whole commands that run no model,
on files of `portraits` that are made before. The last rows are the imports alone of commands that run one, below the
libraries that all of them need.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import measure
from rich import box
from rich.console import Console
from rich.table import Table

TORCH = ("-c", "import torch")
FILES = (
    ("locate", "--limit", "2", "--seeds", "1", "-o", "gender.pt", "-q"),
    ("mask", "gender.relevance.safetensors", "--mu", "4", "-o", "gentle.pt", "-q"),
    ("bench", "--limit", "1", "--images", "2", "--group-images", "0", "--steps", "2", "-o", "a", "-q"),
)
COMMANDS = (
    ("--help",),
    ("inspect", "gender.pt"),
    ("inspect", "gender.relevance.safetensors"),
    ("mask", "gender.relevance.safetensors", "-o", "again.pt", "-q"),
    ("diff", "gender.pt", "gentle.pt"),
    ("compare", "a", "a"),
)
IMPORTS = {
    "libraries": "import datasets, lightning; from diffusers import StableDiffusionPipeline",
    "locate": "import stereo_cli.main, stereoclinic.ddtd.locate",
    "plan": "import stereo_cli.main, stereoclinic.sns.plan",
    "apply": "import stereo_cli.main, stereoclinic.sns.damp, stereoclinic.pipelines.images",
    "bench": "import stereo_cli.main, stereoclinic.calls.evaluate",
    "doctor": "import stereo_cli.main, stereoclinic.calls.diagnosis",
}


def run(folder: Path, *words: str) -> tuple[float, float]:
    """CPU seconds and seconds on the clock of a Python process.

    Raises:
        SystemExit: It failed.
    """
    began = time.perf_counter()
    with open(folder / "output", "w") as output:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)}: {(folder / 'output').read_text()[-400:]}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def compare(folder: Path, words: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """A process against torch alone, in turn."""
    pairs = [(run(folder, *TORCH), run(folder, *words)) for _ in range(repeats)]
    torch, own = ([[each[side][kind] for each in pairs] for kind in (0, 1)] for side in (0, 1))
    return {
        "cpu": measure.ratio(own[0], torch[0]), "clock": measure.ratio(own[1], torch[1]),
        "cpu_seconds": median(own[0]), "torch_cpu_seconds": median(torch[0]),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", action="append", metavar="NAME", help="rows that begin so; may repeat")
    options = parser.parse_args(arguments)
    wanted = {f"stereo {' '.join(words)}": ("-m", "stereo_cli", *words) for words in COMMANDS}
    wanted |= {f"imports: {name}": ("-c", code) for name, code in IMPORTS.items()}
    if options.only:
        wanted = {name: words for name, words in wanted.items() if name.startswith(tuple(options.only))}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if any(name.startswith("stereo") and not name.endswith("--help") for name in wanted):
            for words in FILES:
                run(folder, "-m", "stereo_cli", *words)
        for name, words in wanted.items():
            rows[name] = compare(folder, words, options.repeats)
    table = Table("", "CPU time / import torch", "95 %", "clock", "95 %", "CPU s", box=box.SIMPLE_HEAD, show_edge=False)
    for name, row in rows.items():
        table.add_row(name, *measure.as_text(row["cpu"]), *measure.as_text(row["clock"]), f"{row['cpu_seconds']:.2f}")
    torch = median(row["torch_cpu_seconds"] for row in rows.values())
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"{options.repeats} repeats each; import torch: {torch:.2f} CPU s; load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(
            json.dumps({"repeats": options.repeats, "load": os.getloadavg()[0], "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
