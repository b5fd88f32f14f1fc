"""The cost of damping in a step of the denoiser, by hooks and fused, against the same denoiser undamped.

    python benchmarks/speed/suppression.py                                   # portraits, on the CPU
    python benchmarks/speed/suppression.py --model sd15 --device cuda --batch 4

The batch is guided: half of it is unconditional. Every mask damps every neuron in five timestep bins, which is the
largest mask; `1 %` damps that share of the neurons. Both passes run in turn. *time* is the median of the pairs' ratios
in each process, over processes; `nothing` runs the undamped denoiser twice and shows the noise. *in hooks* is the share
of a damped pass that is spent in hooks; it does not include the hooks' effect on caches, and is measured on a CPU only.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
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
    """A problem with one timestep for the whole batch, as under guidance."""
    problem = build(model, batch, device, dtype)
    timestep = problem.given["timestep"]
    return replace(problem, given={**problem.given, "timestep": timestep[:1].expand(batch).clone()})


def mask_of(kind: str, problem: Problem) -> NeuronMask:
    """Random factors; their values do not change the cost."""
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
    """Attach the mask as a user would, once for a whole run."""
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
    """Yields a list that receives the seconds of every hook before a site or the denoiser: all that suppression does.

    Existing hooks run between the two that take the time.
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
    """Ratio of a damped pass to an undamped one. Hooks are attached and removed outside the timed part."""
    mask = None if kind == "nothing" else mask_of(kind, problem)
    step = partial(problem.predict, problem.latents, problem.states)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for number in range(pairs + 2):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                with treated(kind, mask, problem) if which else nullcontext():
                    step()  # prepares what a run and bin need once
                    own = [measure.seconds(step, device) for _ in range(3)]
                if number >= 2:
                    times[which].append(sorted(own)[1])
    return {
        "ratio": measure.ratio(times[1], times[0])["median"],
        "in_hooks": share_in_hooks(kind, mask, problem, 3 * pairs) if device == "cpu" else None,
        "plain_seconds": sorted(times[0])[pairs // 2],
    }


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own."""
    problem = guided(options.model, options.batch, options.device, measure.dtype_of(options))
    return compare(options.kind, problem, options.pairs, options.device)


def cells(found: list[dict[str, Any]]) -> list[str]:
    """Figures of a row, from all processes."""
    inside = [process["in_hooks"] for process in found if process["in_hooks"] is not None]
    shares = f"{median(inside):.2%} ({min(inside):.2%}-{max(inside):.2%})" if inside else ""
    plain = median(process["plain_seconds"] for process in found)
    ratio = measure.over_processes([process["ratio"] for process in found])
    return [*measure.as_text(ratio), shares, f"{1000 * plain:.0f}"]


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch=16, pairs=10)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default: portraits")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; default: all")
    parser.add_argument("--processes", type=int, default=6)
    options, collected = measure.parsed(parser, job, arguments), []
    for model in options.model or ["portraits"]:
        rows, notes = [], []
        for kind in options.kind or KINDS:
            run = partial(measure.in_own_process, __file__, "time", options, model=model, kind=kind)
            found = [run() for _ in range(options.processes)]
            collected.append({"model": model, "kind": kind, "processes": found})
            errors = [process["error"] for process in found if "error" in process]
            rows.append([kind, "failed"] if errors else [kind, *cells(found)])
            notes += [f"{kind}: {error}" for error in errors]
        title = f"{model}: damped step / the same step undamped; {options.processes} processes of {options.pairs} pairs"
        measure.show(options, title, ["mask", "time", "least to most", "in hooks", "plain ms"], rows, notes)
    measure.write(options, rows=collected)


if __name__ == "__main__":
    main()
