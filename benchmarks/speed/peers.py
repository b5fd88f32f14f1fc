"""Other implementations of relevance propagation on the same UNet: cost, memory, conservation.

They need an environment of their own. They are installed without dependencies: the toolkit has all that is used except
torchvision, which zennit imports; where it is missing, empty names replace it.

    python -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt -e .
    .venv-peers/bin/pip install --no-deps -r benchmarks/speed/peers.txt
    .venv-peers/bin/python benchmarks/speed/peers.py --json peers.json

All compute the same: with f the prediction, the relevance of T = <f, f held constant> at the latents, the text states
and the sinusoids of the timestep, weights frozen. Time is the median of paired ratios to plain forward and backward
from T to these three. Memory is the peak of the allocator in one step, relative to plain. The conservation error is
|sum of relevance - T| / |T|, averaged over samples, in double precision with every bias of the model zeroed, so that
all relevance must reach these inputs. Each runs in a process of its own; an error is shown with its message.
"""

import argparse
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import measure
from adapters import PEERS, Setup, plain
from problems import Problem, build


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

    # Set up for each pass and removed again, so that the plain pass runs on an unchanged model. Only passes are timed.
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


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own."""
    _, peer = PEERS[options.part]
    problem = build(options.model, options.batch, options.device, measure.dtype_of(options))
    return judge(peer, problem, options.pairs, options.device)


def version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch=8, pairs=15)
    parser.add_argument("--model", choices=("portraits", "tiny", "sd15"), default="portraits")
    parser.add_argument("--peer", action="append", help="only rows that begin so; repeatable")
    options, rows, cells = measure.parsed(parser, job, arguments), [], []
    for name, (distribution, _) in PEERS.items():
        if options.peer and not name.startswith(tuple(options.peer)):
            continue
        found = version_of(distribution)
        row = {"peer": name, "version": found, "error": "not installed; see the top of this file"}
        if found:
            row = {"peer": name, "version": found, **measure.in_own_process(__file__, name, options)}
        rows.append(row)
        figures = (
            ["failed"]
            if "error" in row
            else [*measure.as_text(row["time"]), f"{row['peak']:.2f}", f"{row['conservation_error']:.1e}"]
        )
        cells.append([name, found or "", *figures])
    title = f"{options.model}: relevance at latents, text and time / plain forward + backward"
    notes = [f"{row['peer']}: {row['error']}" for row in rows if "error" in row]
    measure.show(options, title, ["", "version", "time", "95 %", "peak memory", "conservation error"], cells, notes)
    measure.write(options, model=options.model, rows=rows)


if __name__ == "__main__":
    main()
