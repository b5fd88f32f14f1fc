"""The cost of `stereo locate`, against sampling the same trajectories.

    python benchmarks/speed/locate.py --json locate.json
    python benchmarks/speed/locate.py --model sd15 --device cuda --batch 8 --steps 20 --pairs 5

Both use the same pipeline, samples, seeds, steps and guidance; every second step is analysed, and no pictures are
decoded. One side is all that `stereo locate` does for a batch, sums included; the other is the pipeline's own call. The
figure is the median of the pairs' ratios, run in turn. `sd15` and `sdxl` are the full UNets with random weights and
random text states.
"""

import argparse
import sys
from statistics import median
from typing import Any

import measure
from problems import EMBEDDED, MODELS, random_text

from stereoclinic.ddtd.locate import DDTD
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.intercept import call_pipeline
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.occupations import PORTRAITS
from stereoclinic.prompts.sets import Samples, generator, load_prompts, with_seeds

GOAL = 2.2  # with every second step analysed


def walk_against_sampling(
    model: Model, samples: Samples, batch: int, settings: Settings, pairs: int, device: str
) -> dict[str, Any]:
    """Cost of a batch of `stereo locate`, relative to sampling it."""
    rows = samples[:batch]
    module, prompts = DDTD(model, load_axis("gender"), settings, samples).to(device), [row["prompt"] for row in rows]

    def sample() -> None:
        generators = [generator(row, "noise") for row in rows]
        call_pipeline(model, None, prompts, generators, settings.steps, settings.guidance)

    plain, walked = measure.paired(sample, lambda: module.predict_step(rows, 0), pairs, device, warm=1)
    return {
        "guidance": settings.guidance,
        "steps": settings.steps,
        "every": settings.every,
        "composite": settings.composite,
        "time": measure.ratio(walked, plain),
        "sampling_seconds": median(plain),
        "locate_seconds": median(walked),
    }


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own: one row for each guidance scale."""
    device, name = options.device, options.model
    dtype = measure.dtype_of(options)
    model = open_model(name, device) if name in EMBEDDED else Model(random_text(name, device, dtype), name)
    samples = with_seeds(load_prompts("portraits"), 0, -(-options.batch // len(PORTRAITS)))
    rows = []
    for guidance in options.guidance or [1.0, 3.0, 7.5]:
        settings = Settings(options.composite, steps=options.steps, guidance=guidance, every=2, bins=1)
        rows.append(walk_against_sampling(model, samples, options.batch, settings, options.pairs, device))
    return {"rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch=16, pairs=10)
    parser.add_argument("--model", choices=MODELS, default="portraits")
    parser.add_argument("--composite", default="epsilon-cp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, action="append", help="repeatable; default: 1, 3 and 7.5")
    options = measure.parsed(parser, job, arguments)
    found = measure.in_own_process(__file__, "walk", options)
    if "error" in found:
        sys.exit(found["error"])
    title = f"{options.model}, {options.composite}: locate, every second step / sampling of the same trajectories"
    measure.show_by_guidance(options, title, found["rows"], GOAL, ("sampling", "locate"))
    measure.write(options, model=options.model, **found)


if __name__ == "__main__":
    main()
