"""What each way of choosing and damping neurons buys and costs: the curve that the default of `stereo locate` follows.

    python benchmarks/mitigation/tradeoff.py gender.relevance.safetensors --guidance 1 --guidance 2

Draws the same calibration seeds with every mask of a grid (plan with several prices mu, top-k of several sizes, windows
of timesteps, roots) and prints parity gap, unsure reads, occupation accuracy and Frechet distance beside the model
untreated and its two ceilings. These seeds choose; what is chosen is judged on others, by `stereo bench`.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stereoclinic.axes import load_axis
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.denoisers import open_denoiser
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.experiment import run
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.prompts import load_prompts
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import treatment_plan
from stereoclinic.sns.select import top_k

CALIBRATION_SEED = 100  # beyond the seeds that locate measures, before those that bench judges


def grid(relevance: Relevance, which: list[str]) -> dict[str, NeuronMask]:
    """Name -> mask; `which` keeps the names that match one of these patterns."""
    top = float(relevance.bin_edges[0])
    windows = {"all steps": None, "t>=600": (top, 0.6 * top), "t>=400": (top, 0.4 * top)}
    makers: dict[str, Callable[[], NeuronMask]] = {}
    for where, window in windows.items():
        for mu, overshoot, root in itertools.product((0.01, 0.1, 1.0), (0.0, 0.5, 1.0), ("zero", "balanced")):
            name = f"plan mu={mu:g} overshoot={overshoot:g} {root} {where}"
            makers[name] = partial(treatment_plan, relevance, mu, overshoot=overshoot, window=window, root=root)
        for share in (0.005, 0.02):
            makers[f"top {share:.1%} {where}"] = partial(top_k, relevance, share, window=window)
    return {name: make() for name, make in makers.items() if not which or any(re.search(each, name) for each in which)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("relevance", type=Path)
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--axis", default="gender")
    parser.add_argument("--images", type=int, default=12, help="images a prompt")
    parser.add_argument("--guidance", type=float, action="append")
    parser.add_argument("--only", action="append", default=[], help="keep masks whose name matches this pattern")
    parser.add_argument("--branch", choices=("both", "conditional"), default="both")
    parser.add_argument("--out", type=Path, default=Path("tradeoff.json"))
    options = parser.parse_args()

    denoiser = open_denoiser(options.model)
    reader = PortraitsReader(denoiser.folder / "reader")
    relevance = Relevance.load(options.relevance)
    masks = {name: replace(mask, branch=options.branch) for name, mask in grid(relevance, options.only).items()}
    console, collected = Console(), []
    for guidance in options.guidance or [1.0]:
        protocol = Protocol(
            load_axis(options.axis), load_prompts("portraits"), options.images, 2, CALIBRATION_SEED, guidance=guidance
        )
        found = run(denoiser, reader, protocol, masks).results
        collected.append(found)
        table = Table(
            "arm", "parity gap", "95 %", "of oracle", "right", "unsure", "Frechet", "group prompts",
            title=f"{options.axis}, guidance {guidance:g}, {options.images} images a prompt, noise floor"
            f" {found['noise_floor']['parity_gap']['upper']:.3f}",
        )  # fmt: skip
        for name, arm in found["arms"].items():
            gap, grouped = arm["parity_gap"], found["group_prompts"].get(name)
            table.add_row(
                name,
                f"{gap['estimate']:.3f}",
                f"{gap['low']:.3f}-{gap['high']:.3f}",
                f"{arm['share_of_balanced_oracle']:.0%}" if "share_of_balanced_oracle" in arm else "",
                f"{arm['occupation_right']['estimate']:.3f}",
                f"{arm['unsure']:.3f}",
                "" if arm["frechet_to_untreated"] is None else f"{arm['frechet_to_untreated']:.3f}",
                f"{grouped['all']['estimate']:.3f}" if grouped else "",
            )
        console.print(table)
    options.out.write_text(json.dumps(collected, indent=2))


if __name__ == "__main__":
    main()
