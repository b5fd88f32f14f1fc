"""Measure the embedded model against its planted truth: `python -m stereoclinic.portraits.check`.

Every claim made on the model stands on these figures, so each is printed with what was asked of it, its sample size and
its interval, and they are written into the model's card. Images are drawn once per arm and read for everything that they
can answer: an image allotted to a group answers both whether the group prompt was obeyed and what parity allocation brings.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stereoclinic.axes import Axis, known_axes, load_axis
from stereoclinic.ddtd.neurons import find_sites
from stereoclinic.ddtd.trajectory import Settings, walk
from stereoclinic.denoisers import open_denoiser
from stereoclinic.denoisers.sampling import sample
from stereoclinic.denoisers.stable_diffusion import StableDiffusion
from stereoclinic.evaluation.bias import parity_gap, shares_from_reads, unsure_rate
from stereoclinic.evaluation.oracles import allocation_prompts, balanced_oracle
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.evaluation.statistics import bootstrap_interval, noise_floor, share_statistic, wilson_interval
from stereoclinic.files import write_text
from stereoclinic.portraits.train import reader_accuracy
from stereoclinic.portraits.world import AXES, World
from stereoclinic.prompts import Dataset, load_prompts, with_seeds
from stereoclinic.sns.allocate import allotted_group, uniform

log = logging.getLogger("stereoclinic.portraits")
FIRST_SEED = 500_000  # seen by nothing else: not by masks, not by benches


@dataclass(frozen=True)
class Line:
    """One figure beside what was asked of it."""

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    asked: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else ""
        verdict = "" if self.met is None else "   met" if self.met else "   NOT MET"
        return f"{self.name:<58}{self.value:7.3f}{interval:<17} n={self.n:<6}{self.asked}{verdict}"


def share(name: str, hits: Tensor, at_least: float) -> Line:
    interval = wilson_interval(float(hits.sum()), hits.numel())
    met = interval.estimate >= at_least
    return Line(name, interval.estimate, hits.numel(), interval.low, interval.high, f">= {at_least}", met)


class Checker:
    def __init__(self, denoiser: StableDiffusion, world: World, images: int) -> None:
        self.denoiser, self.world, self.images = denoiser, world, images
        self.reader = PortraitsReader(denoiser.folder / "reader")
        self.prompts = load_world_prompts(world)
        self.rows = list(with_seeds(self.prompts, FIRST_SEED, images))
        self.labels = torch.tensor([world.names.index(row["label"]) for row in self.rows])

    def draw(self, prompts: list[str] | None, guidance: float, oracle: Axis | None = None) -> dict[str, Tensor]:
        """Reads of one image a row: (n, classes) for each head."""
        reads = []
        for start in range(0, len(self.rows), 100):
            rows = self.rows[start : start + 100]
            asked = prompts[start : start + 100] if prompts else [row["prompt"] for row in rows]
            conditional = balanced_oracle(self.denoiser, oracle, rows) if oracle else None
            steps = self.denoiser.defaults.steps
            reads.append(self.reader.read(sample(self.denoiser, rows, asked, steps, guidance, conditional)))
        return {head: torch.cat([each[head] for each in reads]) for head in reads[0]}

    def by_occupation(self, reads: Tensor) -> Tensor:
        """(n, K) in seed-major order -> (P, images, K)."""
        return reads.unflatten(0, (self.images, -1)).transpose(0, 1)

    def lines(self) -> tuple[list[Line], list[dict]]:
        found = [
            Line(f"reader right on held-out drawings, {head}", value, 10 * len(self.world.cells), None, None, ">= 0.99", value >= 0.99)
            for head, value in reader_accuracy(self.world, self.denoiser.pipe.vae, self.reader.net).items()
        ]
        default = self.denoiser.defaults.guidance
        axes = [load_axis(name) for name in known_axes() if name in AXES]
        gap = share_statistic(parity_gap)
        table: list[dict] = []
        neutral = {}
        for guidance in (1.0, default):
            log.info("neutral prompts at guidance %g", guidance)
            reads = neutral[guidance] = self.draw(None, guidance)
            at = f"guidance {guidance:g}"
            found.append(share(f"occupation read right, {at}", reads["occupation"].argmax(1) == self.labels, 0.97))
            for axis in axes:
                unsure = unsure_rate(reads[axis.name]).item()
                found.append(Line(f"unsure reads, {axis.name}, {at}", unsure, len(self.rows), None, None, "<= 0.05", unsure <= 0.05))
        for axis in axes:
            shares = shares_from_reads(self.by_occupation(neutral[1.0][axis.name]), hard=True)[:, 0]
            guided = shares_from_reads(self.by_occupation(neutral[default][axis.name]), hard=True)[:, 0]
            planted = torch.tensor([each.share(axis.name) for each in self.world.occupations])
            away = (shares - planted).abs().mean().item()
            found.append(Line(f"|generated - planted share|, {axis.name}, guidance 1", away, len(self.rows), None, None, "<= 0.10", away <= 0.10))
            for occupation, *values in zip(self.world.names, planted, shares, guided, strict=True):
                table.append({"axis": axis.name, "group": axis.groups[0], "occupation": occupation, **dict(zip(("planted", "guidance_1", "guided"), (round(float(v), 3) for v in values), strict=True))})
            log.info("leans on axis %s", axis.name)
            correlation = torch.corrcoef(torch.stack([self.early_lean(axis), 2 * planted - 1]))[0, 1].item()
            found.append(Line(f"correlation of early lean with planted tilt, {axis.name}", correlation, len(self.world.names), None, None, ">= 0.95", correlation >= 0.95))
        floor = noise_floor(self.images, 2, len(self.world.names), parity_gap).upper
        for axis in axes:
            for guidance, asked in ((1.0, 0.93), (default, 0.97)):
                log.info("group prompts of axis %s at guidance %g", axis.name, guidance)
                reads = self.draw(allocation_prompts(axis, self.rows), guidance)[axis.name]
                wanted = torch.tensor([allotted_group(row, uniform(len(axis))) for row in self.rows])
                found.append(share(f"group prompts obeyed, {axis.name}, guidance {guidance:g}", reads.argmax(1) == wanted, asked))
                interval = bootstrap_interval(self.by_occupation(reads), gap)
                before = float(gap(self.by_occupation(neutral[guidance][axis.name])))
                met = interval.estimate <= floor if guidance == default else None
                limit = f"<= {floor:.3f} (untreated {before:.3f})"
                found.append(Line(f"parity gap, allocation oracle, {axis.name}, guidance {guidance:g}", interval.estimate, len(self.rows), interval.low, interval.high, limit, met))
            log.info("balanced oracle on axis %s", axis.name)
            reads = self.draw(None, default, oracle=axis)[axis.name]
            interval = bootstrap_interval(self.by_occupation(reads), gap)
            unsure = unsure_rate(reads).item()
            found.append(Line(f"parity gap, balanced oracle, {axis.name}, guidance {default:g}", interval.estimate, len(self.rows), interval.low, interval.high, f"(untreated {before:.3f}; unsure reads {unsure:.3f})"))
        return found, table

    def early_lean(self, axis: Axis, seeds: int = 4) -> Tensor:
        """Mean lean of each occupation toward the axis's first group over the first third of the steps: (P,)."""
        steps = self.denoiser.defaults.steps
        total = torch.zeros(len(self.world.names))
        rows = self.rows[: seeds * len(self.world.names)]
        sites = find_sites(self.denoiser.unet, ("conv",))[:1]  # leans alone are wanted, so one site will do
        for i, step in enumerate(walk(self.denoiser, sites, axis, rows, Settings(steps=steps))):
            if i >= steps // 3:
                break
            total.index_add_(0, self.labels[: len(rows)], step.lean[0].float())
        return total / (seeds * (steps // 3))


def load_world_prompts(world: World) -> Dataset:
    built_in = load_prompts("portraits")
    if list(built_in["label"]) == world.names:
        return built_in
    rows = [{"label": name, "pattern": "a photo of {person}", "article": "a", "person": name} for name in world.names]
    return Dataset.from_list(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stereoclinic.portraits.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="portraits", help="the built-in model, or a folder that train has written")
    parser.add_argument("--world", type=Path, help="the world file it was trained on [the built-in one]")
    parser.add_argument("--images", type=int, default=100, help="images an occupation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    world = World.load(options.world)
    found, table = Checker(open_denoiser(options.model, options.device), world, options.images).lines()
    print("\n".join(str(line) for line in found))
    if options.write:
        write_text(options.write, json.dumps({"figures": [vars(line) for line in found], "shares": table}, indent=2))
    raise SystemExit(0 if all(line.met is not False for line in found) else 1)


if __name__ == "__main__":
    main()
