"""The throughput of `stereo locate` with several processes, and its time outside the denoiser, on portraits.

    python benchmarks/scaling/ranks.py --devices 1 --devices 2 --json ranks.json

Ranks: the command on few and on many samples, in turn. The slope of the two is the throughput; the rest is start-up:
imports, loading, starting the ranks, adding up, choosing the mask, writing. Each rank has one thread.

Outside: the share of the loop's time that is spent neither in the denoiser's forward passes nor in the backward passes
(data, text, metric, shards, scheduler, watching), with one rank in this process.

Resume: the time to resume a finished run, which reads the shards and adds them up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stereoclinic.ddtd.locate import DDTD, run_ddtd
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines import open_model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.occupations import PORTRAITS
from stereoclinic.prompts.sets import load_prompts, with_seeds

BATCH = 12


def seconds_of(devices: int, seeds: int) -> float:
    """One run of the command on the 12 prompts, so many seeds each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "stereo_cli", "locate", "--seeds", str(seeds), "--devices", str(devices),
            "--batch-size", str(BATCH // devices), "--accelerator", "cpu", "--quiet", "--json",
            "-o", str(Path(folder) / "gender.pt"),
        ]  # fmt: skip
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def by_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    few, many = options.seeds
    rows = []
    for devices in options.devices:
        slopes, starts = [], []
        for _ in range(options.repeats):
            short, long = seconds_of(devices, few), seconds_of(devices, many)
            rate = (many - few) * len(PORTRAITS) / (long - short)
            slopes.append(rate)
            starts.append(short - few * len(PORTRAITS) / rate)
        rows.append({"devices": devices, "samples_per_second": slopes, "start_up_seconds": starts})
        against = median(rows[0]["samples_per_second"])
        print(
            f"{devices} rank(s): {median(slopes):.2f} samples/s ({min(slopes):.2f} to {max(slopes):.2f}),"
            f" {median(slopes) / against:.2f} x the first; start-up {median(starts):.1f} s"
            f" ({min(starts):.1f} to {max(starts):.1f})",
            flush=True,
        )
    return rows


class Clock:
    """Seconds spent in calls of functions, those within another counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self.depth += 1
            try:
                return function(*arguments, **named)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - began

        return run


def outside(options: argparse.Namespace) -> dict[str, float]:
    """The share of the loop's time beside the denoiser, and the time to resume."""
    torch.set_num_threads(1)
    model, clock, loop = open_model("portraits"), Clock(), Clock()
    samples = with_seeds(load_prompts("portraits"), 0, options.seeds[1])
    model.network.forward = clock.timed(model.network.forward)
    grad, step = torch.autograd.grad, DDTD.predict_step
    torch.autograd.grad = clock.timed(grad)  # type: ignore[assignment]
    DDTD.predict_step = loop.timed(step)  # type: ignore[method-assign]
    settings = Settings(steps=20, every=2)
    with tempfile.TemporaryDirectory() as folder:

        def run() -> float:
            began = time.perf_counter()
            run_ddtd(
                model, load_axis("gender"), samples, settings, batch_size=BATCH, shards=Path(folder) / "shards",
                accelerator="cpu", devices=1,
            )  # fmt: skip
            return time.perf_counter() - began

        try:
            whole = run()
        finally:
            torch.autograd.grad, DDTD.predict_step = grad, step  # type: ignore[method-assign]
        resumed = run()
    found = {
        "samples": float(len(samples)),
        "share_outside_in_the_loop": 1 - clock.seconds / loop.seconds,
        "share_outside_in_all": 1 - clock.seconds / whole,
        "resume_seconds": resumed,
        "seconds": whole,
    }
    print(
        f"outside the denoiser: {found['share_outside_in_the_loop']:.1%} of the loop, with what comes before and after"
        f" it {found['share_outside_in_all']:.1%} of {whole:.0f} s; a finished run is read again in {resumed:.2f} s"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, action="append", help="may repeat")
    parser.add_argument("--seeds", type=int, nargs=2, default=(2, 10), help="a prompt, of the short and the long run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.devices = options.devices or [1, 2]
    found = {"torch": torch.__version__, "outside": outside(options), "ranks": by_ranks(options)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
