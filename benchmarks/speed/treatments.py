"""What treatments cost while pictures are drawn: masks from files, and other methods, against the untreated model.

    python benchmarks/speed/treatments.py gender.pt gender-allocated.pt --baseline equisteer --baseline icm

The same pictures are drawn with and without, in turn; what is made before the first of them is no part of it. Each
process gives one ratio, the median of its pairs; the figure is their median (see `measure.over_processes`). `nothing`
is the untreated model twice.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import measure
import torch
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

FIRST = 700  # of the seeds that are drawn; nothing is judged here


def treatments(options: SimpleNamespace, model: Model) -> list[Mitigation]:
    """All that are compared; other methods are made by the first process, and read by the rest."""
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


def draw(options: SimpleNamespace, model: Model, rows: list[Row], batch: Batch) -> Tensor:
    """Latents of the pictures."""
    walk = Walk(model, rows, options.steps, options.guidance, batch.prompts)
    if batch.prepare is not None:
        walk.visit = batch.prepare(walk)
    return walk.run().images


def compare(options: SimpleNamespace, model: Model, rows: list[Row], treatment: Mitigation) -> float:
    """The median ratio of drawing with a treatment to drawing without."""
    ratios = []
    for number in range(options.pairs + 1):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            with treatment if which else Mitigation("untreated") as acting:
                step = partial(draw, options, model, rows, acting.begin(rows))
                seconds[which] = measure.seconds(step, options.device)
        ratios.append(seconds[1] / seconds[0])
    return median(ratios[1:])  # the first prepares what is prepared once a run


def job(given: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    options = SimpleNamespace(**given)
    torch.set_num_threads(options.threads)
    model = open_model("portraits", options.device, options.dtype or "float32")
    every = len(load_prompts("portraits"))
    rows = list(with_seeds(load_prompts("portraits"), FIRST, -(-options.batch // every)))[: options.batch]
    return {each.name: compare(options, model, rows, each) for each in treatments(options, model)}


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("masks", nargs="*", help="mask files of portraits")
    parser.add_argument("--axis", default="gender")
    parser.add_argument("--baseline", action="append", choices=tuple(BASELINES), help="repeatable")
    parser.add_argument("--seeds", type=int, default=1, help="a prompt, that other methods are made on")
    parser.add_argument("--batch", type=int, default=12, help="pictures")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=6)
    options = parser.parse_args(arguments)
    if options.job:
        measure.answer(job, options.job)
        return
    about, found = measure.environment(options), []
    with tempfile.TemporaryDirectory() as kept:
        for _ in range(options.processes):
            found.append(measure.in_own_process(__file__, "draw", options, kept=kept))
            if "error" in found[-1]:
                parser.error(found[-1]["error"])
    ratios = {name: [each[name] for each in found] for name in found[0]}
    measure.show(
        f"drawing with a treatment / without; batch {options.batch}, {options.steps} steps, guidance"
        f" {options.guidance:g}, {about['dtype']}, {about['device']}, {about['threads']} threads,"
        f" {options.processes} processes of {options.pairs} pairs, load {about['load']:.1f}",
        ["treatment", "time", "least to most"],
        [[name, *measure.as_text(measure.over_processes(own))] for name, own in ratios.items()],
    )
    if options.json:
        Path(options.json).write_text(json.dumps({"environment": about, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
