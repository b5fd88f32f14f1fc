"""Measure the embedded model against its planted truth: `python -m stereoclinic.portraits.check`.

Each figure is printed with its bound, its sample size and its interval, and written into the model's card. An image
that is allotted to a group serves two figures: whether the group prompt was obeyed, and the parity under allocation.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.lean import group_directions, lean
from stereoclinic.errors import InputError, run_script
from stereoclinic.evaluation.methods.oracles import allocation_prompts, balanced
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.io.files import write_text
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.portraits.card import Line, at_least, at_most, card, share, with_interval
from stereoclinic.portraits.denoisers import DENOISERS
from stereoclinic.portraits.train import reader_accuracy
from stereoclinic.portraits.world import AXES, World
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import Row, occupation_prompts, with_seeds
from stereoclinic.sns.allocate import allotted_group, uniform
from stereoclinic.statistics.gaps import gap_interval
from stereoclinic.statistics.intervals import correlation_interval, noise_floor
from stereoclinic.statistics.shares import parity_gap, shares_from_reads, unsure_rate

log = logging.getLogger("stereoclinic.portraits")
FIRST_SEED = 500_000  # used by no mask and no bench


class Checker:
    """Draws from a model trained on a world, and compares with the world's table.

    Args:
        model: The model, from a folder with a reader in it.
        world: The world that it was trained on.
        images: Images for each occupation.
    """

    def __init__(self, model: Model, world: World, images: int) -> None:
        if model.folder is None:
            raise InputError(f"model {model.name!r} is not a local folder; check needs the reader in its folder")
        self.model, self.world, self.images = model, world, images
        self.reader = PortraitsReader(model.folder / "reader")
        self.rows = list(with_seeds(occupation_prompts(world.names), FIRST_SEED, images))
        self.labels = torch.tensor([world.names.index(row["label"]) for row in self.rows])
        self.n = len(self.rows)
        self.guidances = (1.0, model.defaults.guidance)
        self.floor = noise_floor(images, 2, len(world.names), parity_gap).upper

    def lines(self) -> tuple[list[Line], list[dict[str, Any]]]:
        """Every figure, and the table of planted and generated shares."""
        found, table = self.reader_lines(), []
        neutral = {guidance: self.draw(None, guidance) for guidance in self.guidances}
        for guidance, reads in neutral.items():
            right = reads["occupation"].argmax(1) == self.labels
            found.append(share(f"occupation read right, guidance {guidance:g}", right, 0.97))
        for axis in (load_axis(name) for name in AXES):
            log.info("axis %s", axis.name)
            own = {guidance: each[axis.name] for guidance, each in neutral.items()}
            lines, rows = self.neutral_lines(axis, own)
            found += lines + self.group_lines(axis, own) + [self.balanced_line(axis)]
            table += rows
        return found, table

    def reader_lines(self) -> list[Line]:
        accuracy = reader_accuracy(self.world, self.model.pipe.vae, self.reader.net)
        n = 10 * len(self.world.cells)
        name = "reader right on held-out drawings, {}"
        return [at_least(name.format(head), value, n, 0.99) for head, value in accuracy.items()]

    def neutral_lines(self, axis: Axis, reads: dict[float, Tensor]) -> tuple[list[Line], list[dict[str, Any]]]:
        """Unsure reads, generated against planted shares, and the lean's correlation with the planted tilt."""
        found = [
            at_most(f"unsure reads, {axis.name}, guidance {guidance:g}", unsure_rate(each).item(), self.n, 0.05)
            for guidance, each in reads.items()
        ]
        planted = torch.tensor([each.share(axis.name) for each in self.world.occupations])
        shares = {
            guidance: shares_from_reads(self.by_occupation(each), hard=True)[:, 0] for guidance, each in reads.items()
        }
        away = (shares[1.0] - planted).abs().mean().item()
        found.append(at_most(f"|generated - planted share|, {axis.name}, guidance 1", away, self.n, 0.10))
        leans = self.early_lean(axis)
        interval = correlation_interval(leans, 2 * planted - 1)
        name = f"correlation of early lean and planted tilt, {axis.name}"
        found.append(with_interval(name, interval, len(planted), ">= 0.95", interval.estimate >= 0.95))
        rows = [
            {
                "axis": axis.name,
                "group": axis.groups[0],
                "occupation": name,
                "planted": round(planted[i].item(), 3),
                "early_lean": round(leans[i].item(), 3),
                "generated": {f"{guidance:g}": round(each[i].item(), 3) for guidance, each in shares.items()},
            }
            for i, name in enumerate(self.world.names)
        ]
        return found, rows

    def group_lines(self, axis: Axis, neutral: dict[float, Tensor]) -> list[Line]:
        """Whether the allotted group's prompt was obeyed, and the parity gap that allocation leaves."""
        found = []
        wanted = torch.tensor([allotted_group(row, uniform(len(axis))) for row in self.rows])
        for guidance in self.guidances:
            reads = self.draw(allocation_prompts(axis, self.rows), guidance)[axis.name]
            asked = 0.93 if guidance == 1 else 0.97
            name = f"group prompts obeyed, {axis.name}, guidance {guidance:g}"
            found.append(share(name, reads.argmax(1) == wanted, asked))
            gap = gap_interval(self.by_occupation(reads), parity_gap)
            untreated = shares_from_reads(self.by_occupation(neutral[guidance]), hard=True)
            before = parity_gap(untreated).mean().item()
            name = f"parity gap, allocation oracle, {axis.name}, guidance {guidance:g}"
            met = None if guidance == 1 else gap.estimate <= self.floor
            found.append(with_interval(name, gap, self.n, f"<= {self.floor:.3f} (untreated {before:.3f})", met))
        return found

    def balanced_line(self, axis: Axis) -> Line:
        """The parity gap with no lean at all, on half of the seeds: it costs a pass more for each group."""
        guidance = self.guidances[-1]
        half = self.rows[: len(self.rows) // self.images * max(2, self.images // 2)]
        reads = self.draw(None, guidance, oracle=axis, rows=half)[axis.name]
        gap = gap_interval(self.by_occupation(reads), parity_gap)
        unsure = f"(unsure reads {unsure_rate(reads).item():.3f})"
        name = f"parity gap, balanced oracle, {axis.name}, guidance {guidance:g}"
        return with_interval(name, gap, len(half), unsure)

    def draw(
        self, prompts: list[str] | None, guidance: float, oracle: Axis | None = None, rows: list[Row] | None = None
    ) -> dict[str, Tensor]:
        """Reads of one image a row: (n, classes) for each head. Neutral prompts and all rows unless given."""
        rows, reads = rows or self.rows, []
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            asked = prompts[start : start + 100] if prompts else None
            walk = Walk(self.model, part, self.model.defaults.steps, guidance, asked)
            walk.visit = balanced(walk, oracle) if oracle else None
            reads.append(self.reader.read(walk.run("pt").images.cpu()))
        return {head: torch.cat([each[head] for each in reads]) for head in reads[0]}

    def by_occupation(self, reads: Tensor) -> Tensor:
        """(n, K) in seed-major order -> (P, images, K)."""
        by_seed: Tensor = reads.unflatten(0, (-1, len(self.world.names)))  # (images, P, K)
        return by_seed.transpose(0, 1)

    @torch.no_grad()
    def early_lean(self, axis: Axis) -> Tensor:
        """Mean lean of each occupation toward the axis's first group over the first third of the steps: (P,)."""
        total, steps = torch.zeros(len(self.world.names)), self.model.defaults.steps
        early = max(1, len(schedule_of(self.model, steps, 1.0).timesteps) // 3)
        for start in range(0, self.n, 100):
            rows, labels = self.rows[start : start + 100], self.labels[start : start + 100]
            walk = Walk(self.model, rows, steps, 1.0, last=early)
            (groups,) = encode_groups(walk, rows, [axis])

            def visit(call: Call, labels: Tensor = labels, groups: list[Conditions] = groups) -> None:
                leans = lean(call.own(), *group_directions(call.compare(groups)))[0].cpu()
                total.index_add_(0, labels, leans.float() / early)

            walk.visit = visit
            walk.run()
        return total / self.images


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stereoclinic.portraits.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="portraits", help="the built-in model, or a folder that train has written")
    parser.add_argument("--world", type=Path, help="the world file it was trained on [the built-in one]")
    parser.add_argument("--images", type=int, default=100, help="images an occupation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--card", type=Path, help="write the model card to this file")
    parser.add_argument("--hardware", default="unstated hardware", help="for the card: what it was trained on")
    parser.add_argument("--samples", default="samples unstated", help="for the card: how much was seen in training")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    world = World.load(options.world)
    model = open_model(options.model, options.device)
    found, table = Checker(model, world, options.images).lines()
    print("\n".join(str(line) for line in found))
    if options.json:
        write_text(options.json, json.dumps({"figures": [asdict(line) for line in found], "shares": table}, indent=2))
    if options.card:
        denoiser = next(each for each in DENOISERS.values() if isinstance(model.network, each.network))
        about = denoiser.about | {
            "kind": denoiser.name,
            "name": Path(options.model).name,
            "first_seed": FIRST_SEED,
            "parameters": sum(each.numel() for each in model.network.parameters()) / 1e6,
            "images": options.images,
            "hardware": options.hardware,
            "samples": options.samples,
            "steps": model.defaults.steps,
            "guidance": model.defaults.guidance,
            "call": "".join(f", `{name}={value}`" for name, value in model.defaults.call.items()),
        }
        write_text(options.card, card(found, table, **about))
    raise SystemExit(0 if all(line.met is not False for line in found) else 1)


if __name__ == "__main__":
    run_script(main)
