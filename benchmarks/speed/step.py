"""One relevance step against plain forward and backward through the same denoiser.

    python benchmarks/speed/step.py                                        # portraits, on the CPU
    python benchmarks/speed/step.py --model sd15 --model sdxl --device cuda --batch 4 --json step.json

Both go from the target to every site's input and the latents, weights frozen. Each composite is timed in a process of
its own, plain and rule passes in turn; the figure is the median of the pairs' ratios with its bootstrap interval. Peak
memory is the allocator's peak in one step beyond weights and inputs, from processes that run one kind of pass only.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import measure
from problems import MODELS, Problem, build, differentiate

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import COMPOSITES, Composite
from stereoclinic.ddtd.rules.layers import z_plus
from stereoclinic.pipelines.sites import find_sites

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
#: Timed besides the registered composites: z+ where gamma-cp has gamma.
EXTRA = {
    "zplus-convolutions": Composite("zplus-convolutions", {**COMPOSITES["epsilon-cp"].rules, "convolution": z_plus})
}


def rules_of(composite: str, problem: Problem) -> Callable[[], AbstractContextManager]:
    """The context that a pass runs in; made anew for every pass, as in `stereo locate`."""
    return (
        nullcontext if composite == PLAIN else lambda: propagate(EXTRA.get(composite, composite), model=problem.network)
    )


def timed(composite: str, problem: Problem, pairs: int, device: str) -> dict[str, Any]:
    """Time of a composite's pass relative to a plain one."""
    sites = find_sites(problem.network)
    plain = partial(differentiate, problem, sites, nullcontext)
    ruled = partial(differentiate, problem, sites, rules_of(composite, problem))
    plain_seconds, ruled_seconds = measure.paired(plain, ruled, pairs, device)
    return {
        "time": measure.ratio(ruled_seconds, plain_seconds),
        "plain_seconds": median(plain_seconds),
        "rule_seconds": median(ruled_seconds),
    }


def held(composite: str, problem: Problem, device: str) -> dict[str, int]:
    """Peak bytes of one kind of pass; the process must not have run any other kind."""
    step = partial(differentiate, problem, find_sites(problem.network), rules_of(composite, problem))
    for _ in range(2):
        step()
    return {"peak": measure.peak_allocated(step, device)}


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own."""
    problem = build(options.model, options.batch, options.device, measure.dtype_of(options))
    if options.part == "time":
        return timed(options.composite, problem, options.pairs, options.device)
    return held(options.composite, problem, options.device)


def compare(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each composite."""
    run = partial(measure.in_own_process, __file__, options=options, model=model)
    plain = run("memory", composite=PLAIN)
    rows = []
    for composite in options.composite or GOALS:
        found = run("time", composite=composite)
        memory = run("memory", composite=composite) if "error" not in found else {}
        error = next((each["error"] for each in (found, memory, plain) if "error" in each), None)
        row = {"model": model, "composite": composite, "goal": GOALS.get(composite), "error": error, **found}
        rows.append(row if error else row | {"peak": memory["peak"] / plain["peak"]})
    return rows


def show(model: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    cells, notes = [], []
    for row in rows:
        if row["error"]:
            cells.append([row["composite"], "failed"])
            notes.append(f"{row['composite']}: {row['error']}")
            continue
        goal = f"{row['goal']:.2f}" if row["goal"] else ""
        milliseconds = f"{1000 * row['plain_seconds']:.0f}"
        cells.append([row["composite"], *measure.as_text(row["time"]), goal, milliseconds, f"{row['peak']:.3f}"])
    head = ["composite", "time", "95 %", "goal", "plain ms", "peak memory"]
    measure.show(options, f"{model}: relevance step / plain forward + backward", head, cells, notes)


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch=16, pairs=40)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default: portraits")
    parser.add_argument("--composite", action="append", help="repeatable; default: all that have a goal")
    options, collected = measure.parsed(parser, job, arguments), []
    for model in options.model or ["portraits"]:
        rows = compare(model, options)
        collected += rows
        show(model, rows, options)
    measure.write(options, rows=collected)


if __name__ == "__main__":
    main()
