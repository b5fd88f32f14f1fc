"""Are plans worse when only half of the measured steps have an off-axis row? The default of `collateral_every`.

    python benchmarks/mitigation/offaxis.py --sets 5

Each repetition locates the same seeds with every off-axis row and with half of them, makes the default plan of both,
and judges them at points of other seeds: mean |lean| left, movement off the axis in units of ||d||. Differences are
paired; +- is half their 95 % t interval over repetitions.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faithfulness"))
from attributions import points
from common import as_text, parser
from judge import on_leans

from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines import open_model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns.linear import treatment_plan

CALIBRATION, HELD_OUT = 0, 400


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="portraits")
    arguments.add_argument("--sets", type=int, default=5)
    arguments.add_argument("--seeds", type=int, default=8, help="calibration seeds a prompt and repetition")
    arguments.add_argument("--mu", type=float, default=1.0)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    model, axis, prompts = open_model(options.model), load_axis("gender"), load_prompts("portraits")
    settings = Settings(steps=20, every=2)
    found: list[dict[int, dict[str, float]]] = []
    for number in range(options.sets):
        samples = with_seeds(prompts, CALIBRATION + number * options.seeds, options.seeds)
        rows = list(with_seeds(prompts, HELD_OUT + 2 * number, 2))
        held_out = list(points(model, axis, rows, 20, 4))
        verdicts = {}
        for every in (1, 2):
            relevance = run_ddtd(
                model, axis, samples, replace(settings, collateral_every=every), accelerator="cpu", devices=1
            )
            assert relevance is not None
            verdicts[every] = on_leans(model, held_out, treatment_plan(relevance, options.mu)).json()
        found.append(verdicts)
    table = Table("off-axis rows", "mean |lean| left", "off axis", title=f"{options.model}, {options.sets} repetitions")
    for every, name in ((1, "at every measured step"), (2, "at half of them")):
        table.add_row(name, *(as_text([each[every][what] for each in found], 3) for what in ("lean", "off_axis")))
    paired = [as_text([each[2][w] - each[1][w] for each in found], 3, sign=True) for w in ("lean", "off_axis")]
    table.add_row("difference", *paired)
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
