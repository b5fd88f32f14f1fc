"""Deletion and insertion judged by pictures: how the groups' generated shares change.

    python benchmarks/faithfulness/shares.py --model portraits --out shares-portraits.json
    python benchmarks/faithfulness/shares.py --show shares-portraits.json shares-harbour.json --figure docs/shares.png

The curves of `run.py` are of leans, these are of pictures. Down to `--until` the chosen neurons are silenced (deletion,
most or least relevant first), or every neuron is set to its balanced point and the chosen ones are given back
(insertion). At later steps the model is untreated: groups are settled early, and later damping only harms the pictures.

    tilt left    mean over prompts of sign(p - 1/2) (p' - 1/2), with p the untreated share of a prompt and p' the share
                 now, relative to untreated: 1 is unchanged, 0 balanced, below 0 flipped
    ABPC         area between the curves of least and most relevant first, over log share

Scores come from calibration seeds, pictures from other seeds; no repetition shares a seed with another. +- is half a
95 % t interval over repetitions. Repetitions that are in the output file are not drawn again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from attributions import Attribution, Ledger, Reading, ledger
from judge import Chart, balanced_activations, best, given_back
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from show import DRAWN
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import as_text, legend, parser, repeat, resumed, ticks

from stereoclinic.evaluation.readers import PortraitsReader, group_columns
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.bins import bin_of
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.model import Model, network_of
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.pipelines.watch import Visit, Walk, encode_groups
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import occupation_prompts, with_seeds
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.statistics.distances import frechet_between
from stereoclinic.statistics.shares import shares_from_reads, unsure_rate

METHODS = ("gradient", "epsilon-cp", "gamma-cp", "zplus-cp", "CAD", "Wanda", "random")
DELETED = (0.005, 0.02, 0.05)  # shares of all neurons, in each timestep bin
INSERTED = (0.04, 0.16)
CALIBRATION, PICTURES = 0, 3000  # first seeds; no repetition shares one with another


def read(reading: Reading) -> dict[str, Attribution]:
    """The methods that are drawn, of those that `run.py` compares."""
    found: dict[str, Attribution] = {}
    for composite in ("gradient", "epsilon-cp", "gamma-cp", "zplus-cp"):
        found[composite] = reading.decomposed(composite)[composite]
    collateral = found["gradient"].collateral
    assert collateral is not None
    return {**found, "CAD": reading.cad(collateral), "Wanda": reading.wanda()}


class Pictures:
    """One model's pictures under treatments of ranked neurons."""

    def __init__(self, model: Model, reader: PortraitsReader, axis: Axis, options: argparse.Namespace) -> None:
        self.model, self.reader, self.axis, self.options = model, reader, axis, options
        self.sites: list[Site] = find_sites(model.network)
        self.prompts = occupation_prompts(reader.classes["occupation"])
        self.column, self.order = group_columns(reader, axis)

    def rows(self, first: int, each: int, number: int) -> list[dict]:
        return list(with_seeds(self.prompts, first + number * each, each))

    def scores(self, number: int, advance: Callable[[int], None]) -> tuple[Chart, dict[str, Tensor]]:
        options = self.options
        rows = self.rows(CALIBRATION, options.seeds, number)
        kept: Ledger = ledger(self.model, self.sites, self.axis, rows, 20, 2, read, advance)
        chart = Chart.of(kept, self.sites, options.bins)
        found = {name: chart.scores(kept, name) for name in kept.sums}
        generator = torch.Generator().manual_seed(number)
        found["random"] = torch.rand(found["gradient"].shape, generator=generator, dtype=torch.float64)
        return chart, found

    def draw(
        self, rows: list[dict], mask: NeuronMask | None = None, prepare: Callable[[Walk], Visit] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reads (P, n, K) and features."""
        reads, features = [], []
        size = 4 * len(self.prompts)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            with suppress(self.model, mask) if mask is not None else nullcontext():
                drawn = draw(self.model, part, self.options.steps, 1.0, prepare=prepare).float() / 255
            reads.append(self.reader.read(drawn)[self.column][:, self.order])
            features.append(self.reader.features(drawn))
        # Rows come seed by seed, and within a seed prompt by prompt.
        return torch.cat(reads).unflatten(0, (-1, len(self.prompts))).transpose(0, 1), torch.cat(features)

    def given_back(self, chart: Chart, chosen: Tensor) -> Callable[[Walk], Visit]:
        """Balanced down to `until` but for the chosen neurons (T, N), as it is below."""
        network = network_of(self.model)

        def prepare(walk: Walk) -> Visit:
            (groups,) = encode_groups(walk, walk.rows, [self.axis])

            def visit(call: Call) -> None:
                if call.timestep < self.options.until:
                    return
                balanced = balanced_activations(network, self.sites, [partial(call.predict, each) for each in groups])
                kept = chosen[bin_of(call.timestep, chart.edges)]
                with given_back(network, self.sites, balanced, kept):
                    call.reply = call.predict()

            return visit

        return prepare

    def repetition(self, number: int) -> dict:
        options = self.options
        rows = self.rows(PICTURES, options.images, number)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("attributing", total=len(self.prompts) * options.seeds * 10)
            chart, scores = self.scores(number, lambda count: progress.advance(task, count))
            untreated, features = self.draw(rows)
            before = shares_from_reads(untreated.double(), hard=True)[:, 0] - 0.5  # (P,)
            tilt = before.abs().mean().item()

            def judged(drawn: tuple[Tensor, Tensor]) -> dict[str, float]:
                after = shares_from_reads(drawn[0].double(), hard=True)[:, 0] - 0.5
                return {
                    "tilt_left": (before.sign() * after).mean().item() / tilt,
                    "unsure": unsure_rate(drawn[0]).mean().item(),
                    "frechet": frechet_between(drawn[1], features),
                }

            found: dict = {"untreated": {"tilt": tilt, "unsure": unsure_rate(untreated).mean().item()}, "methods": {}}
            window = (float(chart.edges[0]), options.until)
            methods = len(options.method or scores)
            task = progress.add_task("drawing", total=methods * (2 * len(DELETED) + len(INSERTED)))
            for name, score in scores.items():
                if options.method and name not in options.method:
                    continue
                curves: dict[str, list[dict[str, float]]] = {"most": [], "least": [], "inserted": []}
                for side, share in [(side, share) for side in ("most", "least") for share in DELETED]:
                    mask = chart.ranked(score, share, least=side == "least").windowed(window)
                    curves[side].append({"share": share, **judged(self.draw(rows, mask))})
                    progress.advance(task)
                for share in INSERTED:
                    back = self.given_back(chart, best(score, share))
                    curves["inserted"].append({"share": share, **judged(self.draw(rows, prepare=back))})
                    progress.advance(task)
                found["methods"][name] = curves
        return found


def abpc(repetition: dict, name: str) -> float:
    curves = repetition["methods"][name]
    gaps = [least["tilt_left"] - most["tilt_left"] for least, most in zip(curves["least"], curves["most"], strict=True)]
    shares = np.log([each["share"] for each in curves["most"]])
    return float(np.trapezoid(gaps, shares) / (shares[-1] - shares[0]))


def table(found: dict) -> Table:
    sets, settings = found["sets"], found["settings"]
    heads = [f"{side} {100 * share:g} %" for side in ("most", "least") for share in DELETED]
    heads += [f"back {100 * share:g} %" for share in INSERTED]
    made = Table("method", "ABPC", *heads, f"Frechet, most {100 * DELETED[1]:g} %", "unsure",
                 title=f"Tilt left of generated shares: {settings['model']}, {len(sets)} repetitions of"
                 f" {settings['images']} images a prompt; untreated tilt"
                 f" {as_text([each['untreated']['tilt'] for each in sets])}")  # fmt: skip
    for name in sorted(sets[0]["methods"], key=lambda name: -np.mean([abpc(each, name) for each in sets])):
        curves = [each["methods"][name] for each in sets]
        cells = [
            as_text([each[side][i]["tilt_left"] for each in curves])
            for side in ("most", "least", "inserted")
            for i in range(len(curves[0][side]))
        ]
        beside = [as_text([each["most"][1][what] for each in curves]) for what in ("frechet", "unsure")]
        made.add_row(name, as_text([abpc(each, name) for each in sets]), *cells, *beside)
    return made


def figure(results: list[dict]) -> Figure:
    drawing = Figure(figsize=(9, 3.6 * len(results)), layout="constrained")
    panels = drawing.subplots(len(results), 2, squeeze=False)
    for (deletion, insertion), found in zip(panels, results, strict=True):
        for name in found["sets"][0]["methods"]:
            color = DRAWN.get(name, {"gamma-cp": "C4", "Wanda": "C2"}.get(name, "k"))
            for side, panel, line in (("most", deletion, "-"), ("least", deletion, ":"), ("inserted", insertion, "-")):
                curves = [each["methods"][name][side] for each in found["sets"]]
                shares = [100 * each["share"] for each in curves[0]]
                left = np.mean([[each["tilt_left"] for each in curve] for curve in curves], axis=0)
                label = name if side == "most" else None
                panel.plot(shares, left, line, color=color, marker="o", markersize=3, label=label)
        for panel, over, what in ((deletion, DELETED, "silenced"), (insertion, INSERTED, "given back")):
            panel.set(xscale="log", xlabel=f"neurons {what} (%)", ylabel="tilt of generated shares left")
            ticks(panel, [100 * share for share in over])
            panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        model = found["settings"]["model"]
        deletion.set_title(f"{model}: most (solid) and least (dotted) relevant first", fontsize=9, loc="left")
        insertion.set_title("into the balanced point", fontsize=9, loc="left")
    legend(drawing, panels[0][:1])
    return drawing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="portraits")
    arguments.add_argument("--axis", default="gender")
    arguments.add_argument("--sets", type=int, default=5, help="repetitions, with seeds of their own")
    arguments.add_argument("--seeds", type=int, default=3, help="calibration seeds a prompt and repetition")
    arguments.add_argument("--images", type=int, default=4, help="images a prompt, treatment and repetition")
    arguments.add_argument("--steps", type=int, default=10, help="of the pictures; 20 of the scores")
    arguments.add_argument("--bins", type=int, default=5)
    arguments.add_argument("--until", type=float, default=600.0, help="treat down to this timestep")
    arguments.add_argument("--method", action="append", choices=METHODS, help="repeatable; default: all")
    arguments.add_argument("--out", type=Path, default=Path("shares.json"))
    arguments.add_argument("--show", type=Path, nargs="+", help="print what is in these files instead")
    arguments.add_argument("--figure", type=Path)
    options = arguments.parse_args()
    if options.show:
        results = [json.loads(path.read_text()) for path in options.show]
        for each in results:
            Console(width=190).print(table(each))
        if options.figure:
            figure(results).savefig(options.figure, dpi=130)
        return
    model, axis = open_model(options.model), load_axis(options.axis)
    assert model.folder is not None
    kept = ("axis", "seeds", "images", "steps", "bins", "until")
    settings = {"model": Path(options.model).name, **{name: getattr(options, name) for name in kept}}
    found = resumed(options.out, settings)
    pictures = Pictures(model, PortraitsReader(model.folder / "reader"), axis, options)
    repeat(options.out, found, options.sets, pictures.repetition)
    Console(width=190).print(table(found))


if __name__ == "__main__":
    main()
