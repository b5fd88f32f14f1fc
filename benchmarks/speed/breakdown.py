"""Where the time of one relevance step goes, by operation, and how much of it is Python's.

    python benchmarks/speed/breakdown.py --composite epsilon-cp --batch 16 --json breakdown.json

Each operation's own time (without what it calls) in a plain pass and in a pass under the composite, from torch's
profiler. Beside it, timed without the profiler: the cost of the rules' dispatch alone, which is a pass under a
composite whose every rule is the operation itself; and the share of the time during which no operation runs, which is
the interpreter's, the modules' and the dispatch's.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from problems import MODELS, build, differentiate
from torch.profiler import ProfilerActivity, profile

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules.composites import Composite, get_composite
from stereoclinic.pipelines.sites import find_sites

REPEATS = 5


def by_operation(steps: dict[str, measure.Step], device: str) -> tuple[dict[str, Counter[str]], dict[str, float]]:
    """For each step: seconds of each operation itself, and of the whole while it was being profiled; means of some."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    own: dict[str, Counter[str]] = {name: Counter() for name in steps}
    wall = dict.fromkeys(steps, 0.0)
    for repeat in range(REPEATS + 1):
        for name, step in steps.items():  # in turn, as a machine's speed drifts
            with profile(activities=activities) as profiler:
                taken = measure.seconds(step, device)
            if repeat == 0:  # warms up
                continue
            wall[name] += taken / REPEATS
            for event in profiler.key_averages():
                spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                own[name][event.key] += spent / 1e6 / REPEATS
    return own, wall


def dispatch_only(composite: str) -> Composite:
    """The same kinds of operation, each given to a rule, which does what torch would have done."""
    return Composite("dispatch", dict.fromkeys(get_composite(composite).rules, rules.native))


def job(options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    torch.set_num_threads(options["threads"])
    device, dtype = options["device"], measure.dtype_of(argparse.Namespace(**options))
    problem = build(options["model"], options["batch"], device, dtype)
    sites = find_sites(problem.network)

    def under(which: Composite | str) -> Callable[[], AbstractContextManager]:
        return lambda: propagate(which, model=problem.network)

    plain = partial(differentiate, problem, sites, nullcontext)
    ruled = partial(differentiate, problem, sites, under(options["composite"]))
    dispatch = partial(differentiate, problem, sites, under(dispatch_only(options["composite"])))
    own, wall = by_operation({"plain": plain, "rule": ruled}, device)
    timings = measure.paired(plain, ruled, options["pairs"], device)
    dispatched = measure.paired(plain, dispatch, options["pairs"], device)
    return {
        "composite": options["composite"],
        "time": measure.ratio(timings[1], timings[0]),
        "dispatch_time": measure.ratio(dispatched[1], dispatched[0]),
        "outside_operations": {side: 1 - sum(own[side].values()) / wall[side] for side in own},
        "operations": [
            {"operation": name, "plain_seconds": own["plain"][name], "rule_seconds": own["rule"][name]}
            for name, _ in (own["plain"] | own["rule"]).most_common()
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="portraits")
    parser.add_argument("--composite", default="epsilon-cp")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--top", type=int, default=20, help="operations shown")
    options = parser.parse_args(arguments)
    if options.job:
        measure.answer(job, options.job)
        return
    about = measure.environment(options)
    found = measure.in_own_process(__file__, "breakdown", options)
    if "error" in found:
        sys.exit(found["error"])
    total = {side: sum(row[f"{side}_seconds"] for row in found["operations"]) for side in ("plain", "rule")}
    idle = found["outside_operations"]
    measure.show(
        f"{options.model}, {options.composite}, batch {options.batch}, {about['dtype']}, {about['device']},"
        f" {about['threads']} threads, load {about['load']:.1f}: own time by operation, ms a step",
        ["operation", "plain", "share", "rule", "share", "rule - plain"],
        [
            [
                row["operation"][:52],
                f"{1000 * row['plain_seconds']:.2f}",
                f"{row['plain_seconds'] / total['plain']:.1%}",
                f"{1000 * row['rule_seconds']:.2f}",
                f"{row['rule_seconds'] / total['rule']:.1%}",
                f"{1000 * (row['rule_seconds'] - row['plain_seconds']):+.2f}",
            ]
            for row in found["operations"][: options.top]
        ],
        [
            f"step, timed alone: {' '.join(measure.as_text(found['time']))} of plain",
            f"dispatch alone: {' '.join(measure.as_text(found['dispatch_time']))} of plain",
            f"outside any operation, while profiled: plain {idle['plain']:.1%}, rule {idle['rule']:.1%}",
        ],
    )
    if options.json:
        Path(options.json).write_text(json.dumps({"environment": about, **found}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
