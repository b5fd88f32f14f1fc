"""How often the gate errs: by words on written prompts, by leans on the model's own.

    python benchmarks/mitigation/gate.py --model portraits

By words: the gate should see every group prompt of every built-in occupation (else it is missed), and no neutral prompt
(else it is a false alarm). By lean: a prompt counts as naming a group if its lean toward that group stays within a
bound of 1 over the first third of its trajectory. This is exact for group prompts, as leans are measured against them.
But neutral prompts with a total stereotype would be left untreated. Brackets are 95 % Wilson intervals over prompts and
seeds.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from stereoclinic.ddtd.lean import group_directions, lean
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import known_axes, load_axis
from stereoclinic.prompts.occupations import BUILT_IN
from stereoclinic.prompts.sets import group_prompts, load_prompts, occupation_prompts, with_seeds, write
from stereoclinic.sns.policy import is_neutral
from stereoclinic.statistics.intervals import wilson_interval

BOUNDS = (0.05, 0.1, 0.2, 0.3)


@torch.no_grad()
def early_leans(model: Model, axis: str, rows: list[dict], steps: int) -> torch.Tensor:
    """(M, K, B): leans of neutral prompts at the first third of the steps of their unguided trajectories."""
    last = max(1, len(schedule_of(model, steps, 1.0).timesteps) // 3)
    walk, found = Walk(model, rows, steps, 1.0, last=last), list[torch.Tensor]()
    (groups,) = encode_groups(walk, rows, [load_axis(axis)])

    def visit(call: Call) -> None:
        towards = torch.stack([call.predict(each) for each in groups])
        found.append(lean(call.own(), *group_directions(towards)))

    walk.visit = visit
    walk.run()
    return torch.stack(found)


def by_lean(leans: torch.Tensor, bound: float) -> torch.Tensor:
    """Which prompts look as if they named a group: (B,) bool.

    Those whose lean toward one and the same group is within `bound` of 1 at all M steps; NaN is near nothing.

    Args:
        leans: (M, K, B) at M early steps.
        bound: Above 0.
    """
    return ((leans - 1).abs() <= bound).all(0).any(0)


def rate(hits: int, of: int) -> str:
    each = wilson_interval(hits, of)
    return f"{hits} of {of}, {each.estimate:.3f} [{each.low:.3f}, {each.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=600)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict = {"words": {}, "lean": {}}
    table = Table("axis", "prompts", "missed", "false alarms", title="The gate by words")
    for name in known_axes():
        axis = load_axis(name)
        for source in BUILT_IN:
            rows = list(load_prompts(source))
            named = [is_neutral(text, axis) for row in rows for text in group_prompts(row, axis)]
            neutral = [not is_neutral(write(row), axis) for row in rows]
            found["words"][f"{name}, {source}"] = {
                "missed": sum(named), "named": len(named), "false_alarms": sum(neutral), "neutral": len(neutral),
            }  # fmt: skip
            table.add_row(name, source, rate(sum(named), len(named)), rate(sum(neutral), len(neutral)))
    console = Console(width=110)
    console.print(table)
    model = open_model(options.model)
    rows = list(with_seeds(occupation_prompts(BUILT_IN["portraits"]), options.first, options.seeds))
    table = Table("axis", *(f"within {bound:g}" for bound in BOUNDS), title="False alarms of the gate by lean")
    for name in known_axes():
        leans = early_leans(model, name, rows, model.defaults.steps)
        alarms = {bound: int(by_lean(leans, bound).sum()) for bound in BOUNDS}
        found["lean"][name] = {"neutral": len(rows), "false_alarms": alarms}
        table.add_row(name, *(rate(each, len(rows)).split(", ", 1)[1] for each in alarms.values()))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
