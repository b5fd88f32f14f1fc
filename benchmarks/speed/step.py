"""One relevance step against plain forward and backward through the same denoiser.

    python benchmarks/speed/step.py                                        # portraits, on the CPU
    python benchmarks/speed/step.py --model sd15 --model sdxl --device cuda --batch 4 --json step.json
    python benchmarks/speed/step.py --model transformer
    python benchmarks/speed/step.py --pipeline FOLDER                      # any text-to-image pipeline

Both go from the target to every site's input and the latents, weights frozen. A composite is timed in a process of its
own, plain and rule passes in turn; the figure is the median of the pairs' ratios with its bootstrap interval. Memory is
taken in processes that run one kind of pass only: bytes kept for backward, the peak of the allocator in one step beyond
weights and inputs, and on a CPU the peak resident set of the whole process.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from problems import MODELS, Problem, build, differentiate

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import COMPOSITES, Composite
from stereoclinic.ddtd.rules.layers import z_plus
from stereoclinic.pipelines.sites import find_sites, neuron_relevance

PLAIN = "plain"
#: Composite -> the most that a step may cost, as a share of plain forward and backward.
GOALS = {
    "epsilon-cp": 1.05,
    "epsilon-attnlrp": 1.12,
    "gamma-cp": 1.6,
    "zplus-convolutions": 1.6,
    "zplus-cp": 1.6,
    "gradient": 1.05,
}
#: What is timed beside the registered composites: z+ where gamma-cp has gamma, and nowhere else.
EXTRA = {
    "zplus-convolutions": Composite("zplus-convolutions", {**COMPOSITES["epsilon-cp"].rules, "convolution": z_plus})
}


def rules_of(composite: str, problem: Problem) -> Callable[[], AbstractContextManager]:
    """What a pass runs in; made anew for every pass, as `stereo locate` does."""
    return (
        nullcontext if composite == PLAIN else lambda: propagate(EXTRA.get(composite, composite), model=problem.network)
    )


def timed(composite: str, problem: Problem, pairs: int, device: str) -> dict[str, Any]:
    """Cost of a composite's pass relative to a plain one, without and with the sums over positions."""
    sites = find_sites(problem.network)

    def summed() -> None:
        activations, grads = differentiate(problem, sites, rules_of(composite, problem))
        neuron_relevance(activations, grads, sites)

    plain = partial(differentiate, problem, sites, nullcontext)
    ruled = partial(differentiate, problem, sites, rules_of(composite, problem))
    plain_seconds, ruled_seconds = measure.paired(plain, ruled, pairs, device)
    with_sums = measure.paired(plain, summed, max(2, pairs // 2), device, warm=1)
    return {
        "time": measure.ratio(ruled_seconds, plain_seconds),
        "time_with_sums": measure.ratio(with_sums[1], with_sums[0]),
        "plain_seconds": median(plain_seconds),
        "rule_seconds": median(ruled_seconds),
    }


def held(composite: str, problem: Problem, device: str) -> dict[str, int]:
    """Bytes that one kind of pass holds; the process must have run no other kind."""
    sites = find_sites(problem.network)
    step = partial(differentiate, problem, sites, rules_of(composite, problem))
    for _ in range(2):
        step()
    resident = measure.peak_resident()  # before the profiler adds its own
    return {
        "kept": measure.kept_for_backward(step, problem.network),
        "peak": measure.peak_allocated(step, device),
        "resident": resident,
    }


def job(options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    torch.set_num_threads(options["threads"])
    dtype = measure.dtype_of(argparse.Namespace(**options))
    call = json.loads(options["call"] or "{}")
    problem = build(options["model"], options["batch"], options["device"], dtype, call)
    if options["part"] == "time":
        return timed(options["composite"], problem, options["pairs"], options["device"])
    return held(options["composite"], problem, options["device"])


def compare(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a composite: its own figures and those relative to plain."""
    run = partial(measure.in_own_process, __file__, options=options, model=model)
    plain = run("memory", composite=PLAIN)
    rows = []
    for composite in options.composite or GOALS:
        found = run("time", composite=composite)
        own = run("memory", composite=composite) if "error" not in found else {}
        memory = {name: own[name] / plain[name] for name in plain if own.get(name) and plain[name]}
        error = next((each["error"] for each in (found, own, plain) if "error" in each), None)
        rows.append(
            {"model": model, "composite": composite, "goal": GOALS.get(composite), "error": error}
            | {"memory": memory, "bytes": own, "plain_bytes": plain, **found}
        )
    return rows


def show(model: str, rows: list[dict[str, Any]], about: dict[str, Any], batch: int) -> None:
    cells, notes = [], []
    for row in rows:
        if row["error"]:
            cells.append([row["composite"], "failed"])
            notes.append(f"{row['composite']}: {row['error']}")
            continue
        cells.append(
            [
                row["composite"],
                *measure.as_text(row["time"]),
                f"{row['goal']:.2f}" if row["goal"] else "",
                f"{row['time_with_sums']['median']:.3f}",
                f"{1000 * row['plain_seconds']:.0f}",
                *(
                    f"{row['memory'][name]:.3f}" if name in row["memory"] else ""
                    for name in ("kept", "peak", "resident")
                ),
            ]
        )
    measure.show(
        f"{model}: relevance step / plain forward + backward; batch {batch}, {about['dtype']}, {about['device']},"
        f" {about['threads']} threads, load {about['load']:.1f}",
        ["composite", "time", "95 %", "goal", "with sums", "plain ms", "kept", "peak", "resident"],
        cells,
        notes,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default: portraits")
    parser.add_argument("--pipeline", action="append", metavar="FOLDER", help="a text-to-image pipeline; repeatable")
    parser.add_argument("--call", metavar="JSON", help="options of the pipelines' own call")
    parser.add_argument("--composite", action="append", help="repeatable; default: all that have a goal")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args(arguments)
    if options.job:
        measure.answer(job, options.job)
        return
    about, collected = measure.environment(options), []
    asked = [*(options.model or []), *(options.pipeline or [])]
    for model in asked or ["portraits"]:
        rows = compare(model, options)
        collected += rows
        show(model, rows, about, options.batch)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"environment": about, "batch": options.batch, "rows": collected}, indent=2)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
