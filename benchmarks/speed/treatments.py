"""The cost of treatments while pictures are drawn: masks and other methods, against the untreated model.

    python benchmarks/speed/treatments.py gender.pt gender-allocated.pt --baseline equisteer --baseline icm

The same pictures are drawn with and without, in turn; preparations before the first picture are not timed. Each process
gives one ratio, the median of its pairs; the figure is their median (see `measure.over_processes`). `nothing` is the
untreated model twice.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measure
from torch import Tensor

from stereoclinic.evaluation.methods import BASELINES, calibration_samples
from stereoclinic.evaluation.methods.base import Batch, Mitigation, Suppressed
from stereoclinic.evaluation.methods.calibration import Calibration
from stereoclinic.evaluation.methods.checkpoint import kept_baselines
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import Row, load_prompts, with_seeds
from stereoclinic.sns.mask import NeuronMask

FIRST = 700  # seed


def treatments(options: argparse.Namespace, model: Model) -> list[Mitigation]:
    """All that are compared. The first process fits the other methods, the rest read them from files."""
    axis, prompts = load_axis(options.axis), load_prompts("portraits")
    masks: list[Mitigation] = [
        Suppressed(Path(file).stem, model, NeuronMask.load(file), (axis,)) for file in options.masks
    ]
    assert model.folder is not None
    how = Calibration(options.steps, options.guidance, PortraitsReader(model.folder / "reader"))
    samples = calibration_samples(prompts, 100, options.seeds, judged=range(0))
    return [
        Mitigation("nothing"),
        *masks,
        *kept_baselines(options.baseline or [], model, axis, samples, how, Path(options.kept)),
    ]


def draw(options: argparse.Namespace, model: Model, rows: list[Row], batch: Batch) -> Tensor:
    """Latents of the pictures."""
    walk = Walk(model, rows, options.steps, options.guidance, batch.prompts)
    if batch.prepare is not None:
        walk.visit = batch.prepare(walk)
    return walk.run().images


def compare(options: argparse.Namespace, model: Model, rows: list[Row], treatment: Mitigation) -> float:
    """The median ratio of drawing with a treatment to drawing without."""
    ratios = []
    for number in range(options.pairs + 1):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            with treatment if which else Mitigation("untreated") as acting:
                step = partial(draw, options, model, rows, acting.begin(rows))
                seconds[which] = measure.seconds(step, options.device)
        ratios.append(seconds[1] / seconds[0])
    return median(ratios[1:])  # the first pair prepares what a run needs once


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own."""
    model = open_model("portraits", options.device, options.dtype or "float32")
    prompts = load_prompts("portraits")
    rows = list(with_seeds(prompts, FIRST, -(-options.batch // len(prompts))))[: options.batch]
    return {method.name: compare(options, model, rows, method) for method in treatments(options, model)}


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch=12, pairs=5)
    parser.add_argument("masks", nargs="*", help="mask files of portraits")
    parser.add_argument("--axis", default="gender")
    parser.add_argument("--baseline", action="append", choices=tuple(BASELINES), help="repeatable")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per prompt that other methods are fitted on")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=6)
    options, found = measure.parsed(parser, job, arguments), []
    with tempfile.TemporaryDirectory() as kept:
        for _ in range(options.processes):
            found.append(measure.in_own_process(__file__, "draw", options, kept=kept))
            if "error" in found[-1]:
                parser.error(found[-1]["error"])
    ratios = {name: [process[name] for process in found] for name in found[0]}
    measure.show(
        options,
        f"drawing with a treatment / without; {options.steps} steps, guidance {options.guidance:g},"
        f" {options.processes} processes of {options.pairs} pairs",
        ["treatment", "time", "least to most"],
        [[name, *measure.as_text(measure.over_processes(own))] for name, own in ratios.items()],
    )
    measure.write(options, ratios=ratios)


if __name__ == "__main__":
    main()
