"""Other implementations of relevance propagation on the same UNet: cost, memory, conservation.

They live in an environment of their own, beside the toolkit. Without their dependencies: all that is used of them needs
is there already but torchvision, which zennit imports and which cannot be had for every build of torch; where it is
missing, names that do nothing stand in for it.

    python -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt -e .
    .venv-peers/bin/pip install --no-deps -r benchmarks/speed/peers.txt
    .venv-peers/bin/python benchmarks/speed/peers.py --json peers.json

Everyone is asked the same: with f the prediction, the relevance of T = <f, f held constant> at the latents, the text
states and the sinusoids of the timestep, weights frozen. Time is the median of paired ratios to plain forward and
backward from T to these three; memory the peak of the allocator in one step, to plain; the conservation error is
|sum of relevance - T| / |T|, averaged over samples, in double precision with every bias of the model zeroed, so that
there is nothing else for relevance to go to. Each runs in a process of its own. What raises is shown with what it said.
"""

import argparse
import json
import sys
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import measure
import torch
from adapters import PEERS, Setup, plain
from problems import UNETS, Problem, build


def conservation_error(problem: Problem, peer: Setup) -> float:
    """Mean over samples of |sum of relevance - T| / |T|, in double precision, every bias zeroed."""
    network = deepcopy(problem.network).double()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    inputs = problem.latents.double(), problem.states.double(), problem.cotangent
    exact = Problem(network, *inputs, {"timestep": problem.given["timestep"]})
    with peer(exact) as run:
        relevance, prediction = run()
    target = prediction.detach().double().square().flatten(1).sum(1)  # (B,)
    total = sum(part.detach().double().flatten(1).sum(1) for part in relevance)
    return float(((total - target).abs() / target.abs()).mean())


def judge(peer: Setup, problem: Problem, pairs: int, device: str) -> dict[str, Any]:
    """Cost relative to plain forward and backward, and the conservation error."""

    # Set up for each pass and taken down again, so that the plain pass in between meets an untouched model. Setting up
    # is not timed: who uses one of these for a whole run does it once.
    def timed(setup: Setup) -> float:
        with setup(problem) as run:
            return measure.seconds(run, device)

    with plain(problem) as run:
        plain_peak = measure.peak_allocated(run, device)
    with peer(problem) as run:
        run()
        peak = measure.peak_allocated(run, device)
    times: dict[Any, list[float]] = {plain: [], peer: []}
    for number in range(pairs + 1):
        for setup in (plain, peer) if number % 2 else (peer, plain):
            taken = timed(setup)
            if number:  # the first pair warms up
                times[setup].append(taken)
    return {
        "time": measure.ratio(times[peer], times[plain]),
        "peak": peak / plain_peak,
        "conservation_error": conservation_error(problem, peer),
    }


def job(options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    torch.set_num_threads(options["threads"])
    _, peer = PEERS[options["part"]]
    dtype = measure.dtype_of(argparse.Namespace(**options))
    problem = build(options["model"], options["batch"], options["device"], dtype)
    return judge(peer, problem, options["pairs"], options["device"])


def version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", choices=[name for name in UNETS if name != "sdxl"], default="portraits")
    parser.add_argument("--peer", action="append", help="only rows that begin so; repeatable")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args(arguments)
    if options.job:
        measure.answer(job, options.job)
        return
    about, rows = measure.environment(options), []
    for name, (distribution, _) in PEERS.items():
        if options.peer and not name.startswith(tuple(options.peer)):
            continue
        found = version_of(distribution)
        missing = {"error": "not installed; see the top of this file"}
        result = measure.in_own_process(__file__, name, options) if found else missing
        rows.append({"peer": name, "version": found, **result})
    measure.show(
        f"{options.model}: relevance at latents, text and time / plain forward + backward; batch {options.batch},"
        f" {about['dtype']}, {about['device']}, {about['threads']} threads, load {about['load']:.1f}",
        ["", "version", "time", "95 %", "peak memory", "conservation error"],
        [
            [row["peer"], row["version"] or "", "failed"]
            if "error" in row
            else [
                row["peer"],
                row["version"],
                *measure.as_text(row["time"]),
                f"{row['peak']:.2f}",
                f"{row['conservation_error']:.1e}",
            ]
            for row in rows
        ],
        [f"{row['peer']}: {row['error']}" for row in rows if "error" in row],
    )
    if options.json:
        Path(options.json).write_text(
            json.dumps({"environment": about, "model": options.model, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
