"""What damping costs a step of the denoiser: hooked, and fused, against the same denoiser untouched.

    python benchmarks/speed/suppression.py                                   # portraits, on the CPU
    python benchmarks/speed/suppression.py --model sd15 --device cuda --batch 4

A guided batch: half of it unconditional. Every mask damps every neuron in five bins of timesteps, the most that a mask
can hold; `1 %` damps that share. Both passes run in turn; *time* is the median of the pairs' ratios in each process,
over processes. `nothing` runs the untouched denoiser twice: what of a ratio is noise. *In hooks* is the share of a
treated pass that is spent in them, which noise of the whole pass leaves alone; what hooks cost the layers after them,
by what they drive out of the caches, is in *time* only. On a GPU, where hooks only ask for work, there is no such
share.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import measure
import torch
from problems import MODELS, Problem, build

from stereoclinic.pipelines.sites import find_sites
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.fuse import fuse, unfuse
from stereoclinic.sns.mask import NeuronMask

EDGES = torch.tensor([1000.0, 800.0, 600.0, 400.0, 200.0, 0.0])
GROUPS = ("female", "male")
KINDS = ("nothing", "every neuron", "1 %", "conditional half", "rooted", "allotted", "fused")


def guided(model: str, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """A guided batch is at one timestep."""
    problem = build(model, batch, device, dtype)
    timestep = problem.given["timestep"]
    return replace(problem, given={**problem.given, "timestep": timestep[:1].expand(batch).clone()})


def mask_of(kind: str, problem: Problem) -> NeuronMask:
    """Random factors; what they are costs nothing."""
    sites = find_sites(problem.network)
    bins, neurons = len(EDGES) - 1, sum(site.width for site in sites)
    drawn = torch.Generator().manual_seed(0)
    shape = (len(GROUPS), bins, neurons) if kind == "allotted" else (bins, neurons)
    factors = 0.5 + 0.5 * torch.rand(shape, generator=drawn)
    if kind == "1 %":
        factors[:, torch.rand(neurons, generator=drawn) > 0.01] = 1.0
    if kind == "fused":
        factors = factors[:1].expand(bins, -1).clone()
    roots = torch.randn(shape, generator=drawn) if kind == "rooted" else None
    branch = "conditional" if kind in ("conditional half", "allotted") else "both"
    groups = GROUPS if kind == "allotted" else ()
    return NeuronMask(sites, EDGES, factors, roots=roots, branch=branch, groups=groups)


@contextmanager
def treated(kind: str, mask: NeuronMask | None, problem: Problem) -> Iterator[None]:
    """As a user would: attached once, and left on for a whole run."""
    if mask is None:
        yield
    elif kind == "fused":
        fuse(problem.network, mask)
        yield
        unfuse(problem.network)
    else:
        with suppress(problem.network, mask, guided=True) as suppression:
            if mask.allocates:
                images = len(problem.latents) // 2
                suppression.allot([GROUPS[i % len(GROUPS)] for i in range(images)])
            yield


@contextmanager
def timed(problem: Problem) -> Iterator[list[float]]:
    """Yields a list that takes the seconds of every hook before a site or the denoiser: all that suppression does.

    Hooks that are there already run between those of the watch.
    """
    began, spent = [0.0], []

    def begin(*_: Any) -> None:
        began[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent.append(time.perf_counter() - began[0])

    with ExitStack() as handles:
        for name in dict.fromkeys(("", *(site.layer for site in find_sites(problem.network)))):
            module = problem.network.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(begin, prepend=True),
                module.register_forward_pre_hook(end),
            ):
                handles.callback(handle.remove)
        yield spent


def share_in_hooks(kind: str, mask: NeuronMask | None, problem: Problem, passes: int) -> float:
    """Median share of a treated pass that is spent in its hooks."""
    shares = []
    with torch.inference_mode(), treated(kind, mask, problem), timed(problem) as spent:
        for number in range(passes + 2):
            spent.clear()
            whole = measure.seconds(partial(problem.predict, problem.latents, problem.states))
            if number >= 2:
                shares.append(sum(spent) / whole)
    return median(shares)


def compare(kind: str, problem: Problem, pairs: int, device: str) -> dict[str, Any]:
    """Ratio of a treated pass to an untouched one.

    Hooks come on and off between the passes of a pair, outside what is timed.
    """
    mask = None if kind == "nothing" else mask_of(kind, problem)
    step = partial(problem.predict, problem.latents, problem.states)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for number in range(pairs + 2):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                with treated(kind, mask, problem) if which else nullcontext():
                    step()  # what is prepared once a run and bin is no step's cost
                    own = [measure.seconds(step, device) for _ in range(3)]
                if number >= 2:
                    times[which].append(sorted(own)[1])
    return {
        "ratio": measure.ratio(times[1], times[0])["median"],
        "in_hooks": share_in_hooks(kind, mask, problem, 3 * pairs) if device == "cpu" else None,
        "plain_seconds": sorted(times[0])[pairs // 2],
    }


def job(options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    torch.set_num_threads(options["threads"])
    dtype = measure.dtype_of(SimpleNamespace(**options))  # type: ignore[arg-type]
    problem = guided(options["model"], options["batch"], options["device"], dtype)
    return compare(options["kind"], problem, options["pairs"], options["device"])


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default: portraits")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; default: all")
    parser.add_argument("--batch", type=int, default=16, help="of both halves together")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=6)
    options = parser.parse_args(arguments)
    if options.job:
        measure.answer(job, options.job)
        return
    about, collected = measure.environment(options), []
    for model in options.model or ["portraits"]:
        rows, notes = [], []
        for kind in options.kind or KINDS:
            found = [
                measure.in_own_process(__file__, "time", options, model=model, kind=kind)
                for _ in range(options.processes)
            ]
            collected.append({"model": model, "kind": kind, "processes": found})
            if failed := next((each["error"] for each in found if "error" in each), None):
                rows.append([kind, "failed"])
                notes.append(f"{kind}: {failed}")
            else:
                ratio = measure.over_processes([each["ratio"] for each in found])
                inside = [each["in_hooks"] for each in found if each["in_hooks"] is not None]
                shares = f"{median(inside):.2%} ({min(inside):.2%}-{max(inside):.2%})" if inside else ""
                plain = median(each["plain_seconds"] for each in found)
                rows.append([kind, *measure.as_text(ratio), shares, f"{1000 * plain:.0f}"])
        measure.show(
            f"{model}: damped step / the same step untouched; batch {options.batch}, {about['dtype']},"
            f" {about['device']}, {about['threads']} threads, {options.processes} processes of {options.pairs} pairs,"
            f" load {about['load']:.1f}",
            ["mask", "time", "least to most", "in hooks", "plain ms"],
            rows,
            notes,
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"environment": about, "rows": collected}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
