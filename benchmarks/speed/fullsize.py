"""What the commands cost on Stable Diffusion 1.5 and XL at full size: counted, by what `stereo doctor` counts with.

    python benchmarks/speed/fullsize.py
    python benchmarks/speed/fullsize.py --prompts 100 --seeds 8

Settings are the commands' own, guided as the models' pipelines do, in 50 steps; the axis has two groups, and a bench
judges one mask. Passes are of one sample. In FLOP and ratios a backward pass counts as two forward passes. Held:
what is kept of all samples, besides the model and a batch. No model is opened, and nothing is timed.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stereoclinic.calls.cost import Cost, Drawing, Locating, Planning
from stereoclinic.calls.evaluate_settings import EvaluateSettings
from stereoclinic.calls.inputs import every_of
from stereoclinic.calls.locate import LocateSettings
from stereoclinic.calls.plan import AMONG, PlanSettings, others_of
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts

STEPS, BLOCKS = 50, 2
TRAINED = 1000  # timesteps
#: Arms of `bench` with one mask, see `evaluation.experiment`: untreated, mask, random, allocation oracle and reference.
ARMS, GROUPED_ARMS = 5, 2


@dataclass(frozen=True)
class FullSize:
    """A model: its neurons, FLOP of a forward pass of one sample, and pixels of a side."""

    name: str
    neurons: int
    flop: float
    side: int


MODELS = (FullSize("SD 1.5", 95_040, 0.80e12, 512), FullSize("SDXL", 512_960, 6.76e12, 1024))


def costs(model: FullSize, prompts: int, seeds: int | None) -> dict[str, Cost]:
    """The cost of each command at its own settings, for so many prompts, and seeds if they are given."""
    axis, locate, plan, bench = load_axis("gender"), LocateSettings(), PlanSettings(), EvaluateSettings()
    groups, drawn = len(axis), STEPS * BLOCKS
    treated = sum(TRAINED - TRAINED // STEPS * (i + 1) + 1 >= plan.until for i in range(STEPS))
    stay = tuple(len(each) for each in others_of(plan, axis))
    located = Locating(
        prompts, groups, model.neurons, drawn, locate.batch_size, seeds or locate.seeds, prompts, STEPS,
        every_of(STEPS), locate.bins,
    )  # fmt: skip
    planned = Planning(
        prompts, groups, model.neurons, drawn, plan.batch_size, seeds or plan.seeds, treated, BLOCKS > 1, stay,
        groups if plan.allocate else 1, plan.replans, AMONG, plan.check,
    )  # fmt: skip
    judged = Drawing(
        prompts, groups, model.neurons, drawn, bench.batch_size, bench.images or Protocol.images, ARMS, 1,
        GROUPED_ARMS * groups * bench.group_images, 0, 3 * model.side**2,
    )  # fmt: skip
    return {"locate": located.cost(), "plan": planned.cost(), "bench": judged.cost()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(load_prompts("portraits")), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, help="of locate and plan; default: their own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    options = parser.parse_args(arguments)
    heads = ("", "forward", "backward", "drawing", "ratio", "PFLOP", "held, GiB", "disk, GiB")
    table, found = Table(*heads, box=box.SIMPLE_HEAD, show_edge=False), dict[str, Any]()
    for model in MODELS:
        for name, cost in costs(model, options.prompts, options.seeds).items():
            work = cost.forward + 2 * cost.backward
            table.add_row(
                f"{model.name}: {name}", *(f"{round(n):,}" for n in (cost.forward, cost.backward, cost.plain)),
                f"{work / cost.plain:.2f}", f"{work * model.flop / 1e15:,.0f}",
                f"{cost.held / 2**30:.2f}", f"{cost.disk / 2**30:.2f}",
            )  # fmt: skip
            found[f"{model.name}: {name}"] = asdict(cost)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"prompts": options.prompts, "rows": found}, indent=2))


if __name__ == "__main__":
    main()
