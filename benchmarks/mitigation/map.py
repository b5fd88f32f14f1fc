"""Compare ways of choosing and damping neurons, one change at a time. The defaults were chosen by this.

    python benchmarks/mitigation/map.py gender.relevance.safetensors --guidance 2 --out map.json
    python benchmarks/mitigation/map.py gender.relevance.safetensors --mask gender-allocated.pt --vary --only default

Every mask draws the same calibration seeds, and so do the untreated model, the oracles and a random mask. Printed are
the parity gap and the side effects. `--mask` adds masks of `stereo plan`. `--vary` adds parts of these: one kind of
site, one stream of a transformer, a window, the most damped neurons, less damping, both halves of guidance. These seeds
choose; `stereo bench` judges what is chosen on other seeds. Pictures are kept in `--parts`, so a further mask costs
only its own time.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pareto import collect, tables
from rich.console import Console
from rich.progress import Progress

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.experiment import arms_of, run
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.io.files import write_text
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import known_axes, load_axis
from stereoclinic.prompts.sets import occupation_prompts
from stereoclinic.sns.linear import adjusted, choose
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import Selection

CALIBRATION_SEED = 100  # beyond the seeds that locate measures, before those that bench judges

#: Name -> what is changed of `Selection`, the default of `stereo locate`.
VARIATIONS: dict[str, dict] = {
    "default": {},
    "price 0.1": {"mu": 0.1},
    "price 0.3": {"mu": 0.3},
    "price 3": {"mu": 3.0},
    "overshoot 0.5": {"overshoot": 0.5},
    "overshoot 1": {"overshoot": 1.0},
    "t >= 800": {"until": 800.0},
    "t >= 400": {"until": 400.0},
    "all steps": {"until": 0.0},
    "feed-forward only": {"kinds": ("ff",)},
    "attention only": {"kinds": ("attention",)},
    "convolutions only": {"kinds": ("conv",)},
    "balanced root": {"root": "balanced"},
    "conditional half": {"branch": "conditional"},
    "a plan a bin": {"per_bin": True},
    "a plan a bin, balanced root": {"per_bin": True, "root": "balanced"},
    "a plan a bin, price 3": {"per_bin": True, "mu": 3.0},
    "a plan a bin, price 3, balanced root": {"per_bin": True, "mu": 3.0, "root": "balanced"},
    "price 3, balanced root": {"mu": 3.0, "root": "balanced"},
    "at most 10 %": {"at_most": 0.1},
    "at most 1 %": {"at_most": 0.01},
    "top 0.2 %": {"select": "top-k", "top": 0.002},
    "top 0.5 %": {"select": "top-k", "top": 0.005},
    "top 2 %": {"select": "top-k", "top": 0.02},
}
STRENGTHS = (0.25, 0.5, 0.75)  # of the default
KINDS = {"ff": "feed-forward", "attention": "attention", "conv": "convolutions"}


def grid(relevance: Relevance, only: list[str]) -> dict[str, NeuronMask]:
    """Name -> mask; `only` keeps the names that match one of these patterns."""
    neurons = sum(site.width for site in relevance.sites)

    def wanted(name: str) -> bool:
        return not only or any(re.search(each, name) for each in only)

    made = {}
    for name, changed in VARIATIONS.items():
        if wanted(name):
            if "at_most" in changed:
                changed = {"at_most": round(changed["at_most"] * neurons)}
            made[name] = choose(relevance, replace(Selection(), **changed))
    weaker = [share for share in STRENGTHS if wanted(f"strength {share:g}")]
    if weaker:
        default = choose(relevance)
        made |= {f"strength {share:g}": adjusted(default, share) for share in weaker}
    return made


def varied(name: str, mask: NeuronMask) -> dict[str, NeuronMask]:
    """Parts of a mask that is planned as a whole, each less than it in one way."""
    first = float(mask.bin_edges[0])
    kept = {}
    for part in (lambda site: KINDS[site.kind], lambda site: f"{site.stream} tokens"):
        names = sorted({part(site) for site in mask.sites})
        if len(names) > 1:
            kept |= {f"{name}, {each} only": only_at(mask, lambda site, e=each, p=part: p(site) == e) for each in names}
    kept |= {f"{name}, t >= {until}": adjusted(mask, window=(first, until)) for until in (800, 600)}
    kept |= {f"{name}, strength {share:g}": adjusted(mask, share) for share in (0.5, 0.75)}
    kept[f"{name}, its most damped 10 %"] = most_damped(mask, 0.1)
    kept[f"{name}, both halves"] = replace(mask, branch="both")
    return kept


def only_at(mask: NeuronMask, chosen: Callable[[Site], bool]) -> NeuronMask:
    """The mask at some of the sites."""
    factors = mask.factors.clone()
    for site, span in mask.spans():
        if not chosen(site):
            factors[..., span] = 1
    return replace(mask, factors=factors)


def most_damped(mask: NeuronMask, share: float) -> NeuronMask:
    """The mask at this share of all neurons: those it damps most, summed over groups and timesteps."""
    total = mask.damping.flatten(0, -2).sum(0)  # (N,)
    rest = total.argsort(descending=True)[round(share * len(total)) :]
    factors = mask.factors.clone()
    factors[..., rest] = 1
    return replace(mask, factors=factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("relevance", type=Path, nargs="+", help="masks of several are named by their files")
    parser.add_argument("--mask", type=Path, nargs="+", action="extend", default=[], help="further masks; repeatable")
    parser.add_argument("--vary", action="store_true", help="also draw parts of each --mask")
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--axis", default="gender")
    parser.add_argument("--images", type=int, default=8, help="images a prompt")
    parser.add_argument("--group-images", type=int, default=2, help="images a group prompt")
    parser.add_argument("--guidance", type=float, action="append", help="repeatable; default: 2")
    parser.add_argument("--only", action="append", default=[], help="keep masks whose name matches; repeatable")
    parser.add_argument("--parts", type=Path, default=Path("map-parts"), help="folder that keeps pictures")
    parser.add_argument("--out", type=Path, default=Path("map.json"))
    options = parser.parse_args()

    model, axis = open_model(options.model), load_axis(options.axis)
    assert model.folder is not None
    reader = PortraitsReader(model.folder / "reader")
    masks = {}
    for path in options.relevance:
        before = f"{path.name.split('.')[0]}: " if len(options.relevance) > 1 else ""
        masks |= {before + name: mask for name, mask in grid(Relevance.load(path), options.only).items()}
    for path in options.mask:
        masks[path.stem] = NeuronMask.load(path)
        masks |= varied(path.stem, masks[path.stem]) if options.vary else {}
    others = tuple(load_axis(name) for name in known_axes() if name != axis.name)
    prompts = occupation_prompts(reader.classes["occupation"])
    found = []
    for guidance in options.guidance or [2.0]:
        protocol = Protocol(
            axis, prompts, options.images, options.group_images, CALIBRATION_SEED, model.defaults.steps, guidance,
            others=others, all_arms=True,
        )  # fmt: skip
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(f"guidance {guidance:g}", total=arms_of(model, protocol, masks).images)

            def advance(arm: str, count: int, task=task, progress=progress) -> None:
                progress.update(task, advance=count, description=arm)

            experiment = run(model, reader, protocol, masks, progress=advance, parts=options.parts)
        assert experiment is not None
        found.append(experiment.results)
        write_text(options.out, json.dumps({"experiments": found}, indent=1))
    collected, _, about = collect([options.out])
    console = Console(width=170)
    for table in tables(collected, about):
        console.print(table)


if __name__ == "__main__":
    main()
