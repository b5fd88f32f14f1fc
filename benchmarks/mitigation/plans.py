"""Compare settings of `stereo plan`, one change at a time. Its defaults were chosen by this.

    python benchmarks/mitigation/plans.py gender.relevance.safetensors --folder plans
    python benchmarks/mitigation/map.py gender.relevance.safetensors --mask plans/*.pt --only nothing

The first command plans on calibration seeds and writes a file for each setting, in minutes; plans that have a file are
not made again. The second draws all of them on other seeds, which `stereo bench` does not judge on. `planned on other
seeds` and `half the prompts` show how much a plan depends on its samples; the latter is drawn for all prompts.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.prompts.axes import known_axes, load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns.linear import most_useful
from stereoclinic.sns.plan import plan_stepwise
from stereoclinic.sns.stepwise import Stepwise

#: Name -> what is changed: of `Stepwise`, or of what it is planned on.
VARIATIONS: dict[str, dict] = {
    "default": {},
    "price 0.03": {"mu": 0.03},
    "price 0.3": {"mu": 0.3},
    "price 1": {"mu": 1.0},
    "toward the group's mean": {"root": "group"},
    "t >= 600": {"until": 600.0},
    "t >= 200": {"until": 200.0},
    "planned once": {"replans": 1},
    "a tenth of the neurons": {"among": 0.1},
    "a quarter of the samples": {"share": 0.25},
    "twice the samples": {"share": 2.0},
    "planned on other seeds": {"seed": 50},
    "half the prompts": {"every": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("relevance", type=Path)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=16, help="seeds a prompt")
    parser.add_argument("--only", action="append", choices=tuple(VARIATIONS), help="repeatable; default: all")
    parser.add_argument("--folder", type=Path, default=Path("plans"))
    options = parser.parse_args()

    located = Relevance.load(options.relevance)
    model, axis = open_model(str(located.metadata["model"])), load_axis(str(located.metadata["axis"]))
    others = [load_axis(name) for name in known_axes() if name != axis.name]
    prompts = load_prompts("portraits")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only or VARIATIONS:
        file = options.folder / f"{name}.pt"
        if file.exists():
            continue
        changed = dict(VARIATIONS[name])
        measured = prompts.select(range(0, len(prompts), changed.pop("every", 1)))
        seeds = max(1, round(options.seeds * changed.pop("share", 1.0)))
        samples = with_seeds(measured, changed.pop("seed", 0), seeds)
        among = changed.pop("among", 1.0)
        settings = replace(Stepwise(guidance=options.guidance, steps=model.defaults.steps), **changed)
        timesteps = schedule_of(model, settings.steps, settings.guidance).timesteps
        treated = sum(each >= settings.until for each in timesteps)
        window = float(located.bin_edges[0]), settings.until
        candidates = most_useful(located, among, window, settings.mu, True) if among < 1 else None
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(name, total=treated * len(samples) * len(axis))

            def advance(count: int, task=task, progress=progress) -> None:
                progress.update(task, advance=count)

            mask = plan_stepwise(model, axis, samples, settings, True, others, candidates, progress=advance)
        mask.save(file)


if __name__ == "__main__":
    main()
