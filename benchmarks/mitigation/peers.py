"""Published ways of making pictures less stereotyped, beside masks: one table of parity, side effects, and cost.

    python benchmarks/mitigation/peers.py gender.pt --images 8 --out peers.json

Every comparator is calibrated on the same prompts with seeds of their own (--first-seed, --seeds a prompt), and judged
on the seeds that the masks are. Its settings are its defaults. "over floor" is the Frechet distance within groups over
its floor, "overhead" the sampling time over the untreated model's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stereoclinic.axes import load_axis
from stereoclinic.denoisers import open_denoiser
from stereoclinic.denoisers.loading import model_folder
from stereoclinic.evaluation.arms import UNTREATED, Protocol
from stereoclinic.evaluation.baselines import BASELINES, calibration_samples, fit_baselines
from stereoclinic.evaluation.baselines.calibration import Calibration
from stereoclinic.evaluation.experiment import run
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.files import write_text
from stereoclinic.prompts import load_prompts
from stereoclinic.sns.mask import NeuronMask

COLUMNS = (
    "arm",
    "parity gap",
    "over floor",
    "occupation",
    "group prompts",
    "needs",
    "calibration",
    "passes",
    "overhead",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", nargs="*", type=Path)
    parser.add_argument("--baseline", action="append", choices=list(BASELINES), help="all by default")
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--axis", default="gender")
    parser.add_argument("--limit", type=int, help="prompts")
    parser.add_argument("--images", type=int, default=8, help="a prompt")
    parser.add_argument("--group-images", type=int, default=2, help="a group prompt")
    parser.add_argument("--seeds", type=int, default=2, help="calibration seeds a prompt")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5000, help="first judged seed")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--parts", type=Path, help="folder that keeps what was drawn")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    options = parser.parse_args()

    denoiser, axis, console = open_denoiser(options.model), load_axis(options.axis), Console(stderr=True)
    folder = model_folder(options.model)
    if folder is None:
        parser.error(f"{options.model} brings no reader of its own")
    reader, prompts = PortraitsReader(folder / "reader"), load_prompts("portraits", options.limit)
    protocol = Protocol(
        axis,
        prompts,
        options.images,
        options.group_images,
        options.seed,
        options.steps or denoiser.defaults.steps,
        options.guidance or denoiser.defaults.guidance,
    )
    masks = {path.stem: NeuronMask.load(path) for path in options.masks}
    judged = range(options.seed, options.seed + 2 * options.images)  # other seeds and reference included
    samples = calibration_samples(prompts, options.first_seed, options.seeds, judged)
    calibration = Calibration(protocol.steps, protocol.guidance, reader, protocol.shares)
    peers = []
    for name in options.baseline or BASELINES:
        console.print(f"calibrating {name}")
        peers += fit_baselines([name], denoiser, axis, samples, calibration)
    experiment = run(
        denoiser, reader, protocol, masks, progress=lambda arm, count: console.print(f"{arm}: {count}"),
        parts=options.parts, baselines=peers, accelerator="cpu",
    )  # fmt: skip
    assert experiment is not None
    results = experiment.results
    write_text(options.out, json.dumps(results, indent=1))
    Console(width=170).print(table(results))


def table(results: dict[str, Any]) -> Table:
    """One row an arm."""
    made = Table(title=f"axis {results['axis']}, guidance {results['guidance']:g}, {results['steps']} steps")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("arm", "needs") else "right")
    plain = results["arms"][UNTREATED]["seconds"]
    for name, arm in results["arms"].items():
        about, obeyed = results["baselines"].get(name), results["group_prompts"].get(name)
        within, floor = arm.get("frechet_within_groups"), arm.get("frechet_within_groups_floor")
        right = arm.get("occupation_right")
        made.add_row(
            name,
            said(arm["parity_gap"]),
            f"{within / floor:.2f}" if within is not None and floor else "",
            said(right),
            said(obeyed["all"]) if obeyed else "",
            about["needs"] if about else "",
            f"{about['seconds']:.0f} s" if about else "",
            f"{about['forward']} + {about['backward']}" if about else "",
            f"{arm['seconds'] / plain:.2f} x" if plain else "",
        )
    return made


def said(figure: Any) -> str:
    if figure is None:
        return ""
    return f"{figure['estimate'] if isinstance(figure, dict) else figure:.3f}"


if __name__ == "__main__":
    main()
