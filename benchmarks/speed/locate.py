"""What `stereo locate` costs: its walk against plain sampling of the same trajectories, and how it grows.

    python benchmarks/speed/locate.py --json locate.json
    python benchmarks/speed/locate.py --model sd15 --device cuda --batch 8 --steps 20 --pairs 5

Walk: the same pipeline, samples, seeds, steps and guidance, every second step analysed, no pictures decoded on either
side; what is timed is all that a batch costs `stereo locate`, sums included, against the pipeline's own call, which
nobody watches. Both run in turn; the figure is the median of the pairs' ratios. `sd15` and `sdxl` are the full UNets
with random weights and random text states.

Growth: the whole of `locate` on the shipped model, in a process of its own for each number of prompts and of steps:
seconds, and the peak resident set, in all and beyond what the process held when it began. Results are kept by label, so
prompts of the same 12 occupations share rows, and prompts that name a person of their own each add one.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from problems import UNETS, random_text

from stereoclinic.ddtd.locate import DDTD
from stereoclinic.ddtd.locate import locate as locate_all
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


def walks(options: dict[str, Any]) -> dict[str, Any]:
    """One row a guidance scale."""
    device, dtype = options["device"], measure.dtype_of(argparse.Namespace(**options))
    name = options["model"]
    model = open_model(name, device) if name == "portraits" else Model(random_text(name, device, dtype), name)
    samples = with_seeds(load_prompts("portraits"), 0, -(-options["batch"] // len(PORTRAITS)))
    return {
        "rows": [
            walk_against_sampling(
                model,
                samples,
                options["batch"],
                Settings(options["composite"], steps=options["steps"], guidance=guidance, every=2, bins=1),
                options["pairs"],
                device,
            )
            for guidance in options["guidance"] or [1.0, 3.0, 7.5]
        ]
    }


def many_prompts(count: int, own_labels: bool, folder: Path) -> Path:
    """A file of `count` prompts of the 12 occupations, no two the same."""
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(count):
            occupation = PORTRAITS[number % len(PORTRAITS)]
            row = {"prompt": f"a photo of a {occupation} {number}"}
            file.write(json.dumps(row if own_labels else row | {"occupation": occupation}) + "\n")
    return path


def grown(options: dict[str, Any]) -> dict[str, Any]:
    """The whole of `locate`, for one number of prompts and steps."""
    model = open_model("portraits")
    with tempfile.TemporaryDirectory() as folder:
        rows = load_prompts(many_prompts(options["prompts"], options["own_labels"], Path(folder)))
    settings = Settings(options["composite"], steps=options["steps"], every=2, bins=2)
    before = measure.peak_resident()
    start = time.perf_counter()
    samples = with_seeds(rows, 0, 1)
    found = locate_all(
        model, load_axis("gender"), samples, settings, batch_size=options["batch"], accelerator="cpu", devices=1
    )
    after = measure.peak_resident()
    return {
        "seconds": time.perf_counter() - start,
        "labels": len(found.labels),
        "resident": after,
        "resident_beyond_start": after - before,
    }


def job(options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    torch.set_num_threads(options["threads"])
    return {"walk": walks, "growth": grown}[options["part"]](options)


def growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of prompts, by shared labels and by their own, and for each number of steps."""
    few = min(options.prompts)
    cases = [(prompts, 4, False) for prompts in options.prompts]
    cases += [(few, steps, False) for steps in (8, 16, 32)]
    cases += [(prompts, 4, True) for prompts in options.prompts if prompts > len(PORTRAITS)]
    rows = []
    for prompts, steps, own in cases:
        found = measure.in_own_process(__file__, "growth", options, prompts=prompts, steps=steps, own_labels=own)
        rows.append({"prompts": prompts, "steps": steps, **found})
    return rows


def show_walks(rows: list[dict[str, Any]], title: str) -> None:
    measure.show(
        f"{title}: locate / sampling of the same trajectories",
        ["guidance", "steps", "every", "time", "95 %", "goal", "sampling s", "locate s"],
        [
            [
                f"{row['guidance']:g}",
                str(row["steps"]),
                str(row["every"]),
                *measure.as_text(row["time"]),
                f"{GOAL:.1f}",
                f"{row['sampling_seconds']:.2f}",
                f"{row['locate_seconds']:.2f}",
            ]
            for row in rows
        ],
    )


def show_growth(rows: list[dict[str, Any]]) -> None:
    measure.show(
        "Growth of locate on portraits",
        ["prompts", "steps", "labels", "seconds", "ms/prompt/step", "peak MiB", "beyond start"],
        [
            [str(row["prompts"]), str(row["steps"]), "failed"]
            if "error" in row
            else [
                str(row["prompts"]),
                str(row["steps"]),
                str(row["labels"]),
                f"{row['seconds']:.1f}",
                f"{1000 * row['seconds'] / row['prompts'] / row['steps']:.1f}",
                f"{row['resident'] / measure.MEBIBYTE:.0f}",
                f"{row['resident_beyond_start'] / measure.MEBIBYTE:.0f}",
            ]
            for row in rows
        ],
        [row["error"] for row in rows if "error" in row],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", choices=tuple(UNETS), default="portraits")
    parser.add_argument("--composite", default="epsilon-cp")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--guidance", type=float, action="append", help="repeatable; default: 1, 3 and 7.5")
    parser.add_argument("--only", choices=("walk", "growth"), help="one part; default: both, growth on a CPU only")
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 100, 1000], help="of the growth part")
    options = parser.parse_args(arguments)
    if options.job:
        measure.answer(job, options.job)
        return
    about: dict[str, Any] = {"environment": measure.environment(options), "model": options.model}
    at = about["environment"]
    if options.only != "growth":
        found = measure.in_own_process(__file__, "walk", options)
        if "error" in found:
            sys.exit(found["error"])
        about["walk"] = found["rows"]
        show_walks(
            found["rows"],
            f"{options.model}, {options.composite}, batch {options.batch}, {at['device']}, {at['threads']} threads,"
            f" load {at['load']:.1f}",
        )
    if options.only == "growth" or (options.only is None and options.device == "cpu" and options.model == "portraits"):
        about["growth"] = growth(options)
        show_growth(about["growth"])
    if options.json:
        Path(options.json).write_text(json.dumps(about, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
