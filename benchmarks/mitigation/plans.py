"""Compare settings of `stereo plan`: a share of the neurons with a price, and one change at a time.

    python benchmarks/mitigation/plans.py gender.relevance.safetensors --folder plans
    python benchmarks/mitigation/map.py gender.relevance.safetensors --mask plans/*.pt --only nothing

The first command plans on calibration seeds and writes a file for each setting, in minutes; plans that have a file are
not made again. The second draws all of them on other seeds, which `stereo bench` does not judge on. `planned on other
seeds` and `half the prompts` show how much a plan depends on its samples; the latter is drawn for all prompts.
"""

import argparse
from pathlib import Path

from stereo_cli.progress import TerminalReporter
from stereoclinic import plan
from stereoclinic.calls.plan import PlanSettings
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.prompts.sets import load_prompts

#: Name -> what is changed of `PlanSettings`; `every` keeps one of so many prompts.
VARIATIONS: dict[str, dict] = {
    "default": {},
    **{
        f"{share:g} of the neurons, price {mu:g}": {"among": share, "mu": mu}
        for share in (0.1, 0.3, 1)
        for mu in (0.1, 0.3, 1)
    },
    "toward the group's mean": {"root": "group"},
    "t >= 600": {"until": 600.0},
    "t >= 200": {"until": 200.0},
    "planned once": {"replans": 1},
    "half the seeds": {"seeds": PlanSettings().seeds // 2},
    "twice the seeds": {"seeds": PlanSettings().seeds * 2},
    "planned on other seeds": {"seed": 50},
    "half the prompts": {"every": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("relevance", type=Path)
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--only", action="append", choices=tuple(VARIATIONS), help="repeatable; default: all")
    parser.add_argument("--folder", type=Path, default=Path("plans"))
    options = parser.parse_args()

    located, prompts = Relevance.load(options.relevance), load_prompts("portraits")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only or VARIATIONS:
        file = options.folder / f"{name}.pt"
        if file.exists():
            continue
        changed = dict(VARIATIONS[name])
        measured = prompts.select(range(0, len(prompts), changed.pop("every", 1)))
        settings = PlanSettings(guidance=options.guidance, check=0, **changed)
        model, axis = str(located.metadata["model"]), str(located.metadata["axis"])
        plan(model, axis, measured, located, settings, out=file, reporter=TerminalReporter(False))


if __name__ == "__main__":
    main()
