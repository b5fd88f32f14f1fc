"""Which method finds the right neurons: every composite against every baseline, on held-out seeds.

    python benchmarks/faithfulness/run.py --model portraits --out portraits.json
    python benchmarks/faithfulness/show.py portraits.json other.json --figure docs/faithfulness.png

Each of `--sets` repetitions locates on its own calibration seeds, by every method on the same points, and judges on its
own held-out seeds: deletion and insertion curves of the lean, the treatment plan from the method's rows, and images.
Measured once: the correlation with the true effect of silencing single neurons, the similarity of the scores to those
of a model with random weights, and the stability of the ranking between repetitions and between halves of the prompts.
Repetitions that are in the output file are not run again.
"""

import argparse
import copy
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from attributions import Ledger, Point, Reading, ledger, points
from judge import Chart, best, inserted, on_images, on_leans, true_effects
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parser, repeat, resumed

from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.io.files import write_text
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import SITE_KINDS, Site, find_sites
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import occupation_prompts, with_seeds
from stereoclinic.sns.linear import treatment_plan
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.statistics.distances import frechet_between

DELETED = (0.0025, 0.005, 0.01, 0.02, 0.05)  # shares of all neurons
INSERTED = (0.01, 0.04, 0.16)
PRICES = (0.1, 1.0)
IMAGE_RANKINGS = ("epsilon-cp", "epsilon-cp rooted", "gradient", "integrated gradients", "|difference|", "random")
CALIBRATION, HELD_OUT, IMAGES = 0, 400, 2000  # first seeds; no repetition shares one with another


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="portraits")
    arguments.add_argument("--axis", default="gender")
    arguments.add_argument("--sets", type=int, default=5, help="repetitions, with seeds of their own")
    arguments.add_argument("--seeds", type=int, default=4, help="calibration seeds a prompt and repetition")
    arguments.add_argument("--judged", type=int, default=3, help="held-out seeds a prompt and repetition")
    arguments.add_argument("--images", type=int, default=10, help="images a prompt, mask and repetition; 0 for none")
    arguments.add_argument("--single", type=int, default=60, help="neurons of each kind silenced alone; 0 for none")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--every", type=int, default=2)
    arguments.add_argument("--bins", type=int, default=5)
    arguments.add_argument("--guidance", type=float, default=1.0, help="of the images")
    arguments.add_argument("--out", type=Path, default=Path("faithfulness.json"))
    options = arguments.parse_args()

    model, axis = open_model(options.model), load_axis(options.axis)
    assert model.folder is not None
    reader = PortraitsReader(model.folder / "reader")
    bench = Bench(model, reader, axis, options)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "sets")}
    settings["model"] = Path(options.model).name
    found = resumed(options.out, settings)

    def once(number: int) -> dict:
        began = time.monotonic()
        kept = bench.locate(number)
        save_tensors(scores_of(options.out, number), "scores", 1, bench.scores(kept), {})
        repetition = bench.judge(kept, number)
        if "once" not in found:
            found["once"] = bench.once(kept)
        Console(stderr=True).print(f"repetition {number + 1} of {options.sets}: {time.monotonic() - began:.0f} s")
        return repetition

    repeat(options.out, found, options.sets, once)
    if options.sets > 1:
        rankings = [load_tensors(scores_of(options.out, number), "scores", 1)[0] for number in range(options.sets)]
        found["stability"] = stability(rankings)
        write_text(options.out, json.dumps(found, indent=1))


def scores_of(out: Path, number: int) -> Path:
    """Where the scores of one repetition are kept, for comparison with the others'."""
    return out.with_name(f"{out.stem}.scores-{number}.safetensors")


class Bench:
    """The model, its prompts, and the seeds of each repetition."""

    def __init__(self, model: Model, reader: PortraitsReader, axis: Axis, options: argparse.Namespace) -> None:
        self.model, self.reader, self.axis, self.options = model, reader, axis, options
        self.sites: list[Site] = find_sites(model.network)
        self.kinds = [kind for kind in SITE_KINDS if any(site.kind == kind for site in self.sites)]
        self.prompts = occupation_prompts(reader.classes["occupation"])

    def rows(self, first: int, each: int, number: int) -> list[dict]:
        return list(with_seeds(self.prompts, first + number * each, each))

    def locate(self, number: int, rows: list[dict] | None = None) -> Ledger:
        options = self.options
        rows = rows or self.rows(CALIBRATION, options.seeds, number)
        total = len(rows) * len(range(0, options.steps, options.every))
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("attributing", total=total)
            return ledger(
                self.model, self.sites, self.axis, rows, options.steps, options.every, Reading.all,
                lambda count: progress.advance(task, count),
            )  # fmt: skip

    def chart(self, kept: Ledger, bins: int | None = None) -> Chart:
        return Chart.of(kept, self.sites, bins or self.options.bins)

    def scores(self, kept: Ledger) -> dict[str, Tensor]:
        """(T, N) of every method, and of chance."""
        chart = self.chart(kept)
        found = {name: chart.scores(kept, name) for name in kept.sums if not name.endswith("mean-rooted")}
        generator = torch.Generator().manual_seed(int(kept.count.sum()) + len(found))
        found["random"] = torch.rand(found["gradient"].shape, generator=generator, dtype=torch.float64)
        return found

    def held_out(self, number: int, every: int = 4) -> list[Point]:
        rows = self.rows(HELD_OUT, self.options.judged, number)
        return list(points(self.model, self.axis, rows, self.options.steps, every))

    def judge(self, kept: Ledger, number: int) -> dict:
        """Curves, plans and images of one repetition."""
        held_out, chart = self.held_out(number), self.chart(kept)
        scores = self.scores(kept)
        untreated = on_leans(self.model, held_out, None)
        found: dict = {"untreated": untreated.json(), "rankings": {}, "plans": {}, "variants": {}, "images": {}}
        masks: dict[str, NeuronMask | None] = {"untreated": None}
        early = 0.6 * float(chart.edges[0])
        window = (float(chart.edges[0]), early)
        with Progress(console=Console(stderr=True)) as progress:
            for name, score in progress.track(scores.items(), description="curves"):
                curve = {"most": [], "least": []}
                for side, share in [(side, share) for side in curve for share in DELETED]:
                    mask = chart.ranked(score, share, least=side == "least")
                    curve[side].append({"share": share, **on_leans(self.model, held_out, mask).json()})
                chosen = [best(score, share) for share in INSERTED]
                tilts = inserted(self.model, self.sites, held_out, chosen)
                curve["inserted"] = [{"share": s, "tilt": t} for s, t in zip(INSERTED, tilts, strict=True)]
                found["rankings"][name] = curve
                if name in IMAGE_RANKINGS:
                    masks[f"top 2 %: {name}"] = chart.ranked(score, 0.02).windowed(window)
            for name in progress.track(list(kept.sums), description="plans"):
                if kept.sums[name].rows is None:
                    continue
                relevance = chart.relevance(kept, name)
                root = "balanced" if name.endswith("rooted") else "zero"
                found["plans"][name] = []
                for mu in PRICES:
                    mask = treatment_plan(relevance, mu, root=root)
                    verdict = on_leans(self.model, held_out, mask).json()
                    found["plans"][name].append({"mu": mu, "damping": mask.damping.mean().item(), **verdict})
                masks[f"plan: {name}"] = treatment_plan(relevance, 1.0, overshoot=1.0, window=window, root=root)
            for bins, kinds in progress.track(self.variants(), description="sites and bins"):
                other = self.chart(kept, bins).relevance(kept, "epsilon-cp")
                mask = treatment_plan(other, 1.0, kinds=kinds or None)
                verdict = on_leans(self.model, held_out, mask)
                found["variants"][f"{bins} bins, {' + '.join(kinds) or 'all sites'}"] = verdict.json()
            if self.options.images:
                rows = self.rows(IMAGES, self.options.images, number)
                untreated_features = None
                for name, mask in progress.track(masks.items(), description="images"):
                    figures, features = on_images(
                        self.model,
                        self.reader,
                        self.axis.name,
                        rows,
                        self.options.steps,
                        self.options.guidance,
                        mask,
                    )
                    untreated_features = features if untreated_features is None else untreated_features
                    found["images"][name] = {**figures, "frechet": frechet_between(features, untreated_features)}
        return found

    def variants(self) -> list[tuple[int, tuple[str, ...]]]:
        bins = [(bins, ()) for bins in (1, 2, 5, len(range(0, self.options.steps, self.options.every)))]
        kinds: list[tuple[str, ...]] = [(kind,) for kind in self.kinds]
        if len(kinds) > 2:  # two together are all sites
            kinds += pairwise(self.kinds)
        return [*bins, *((self.options.bins, each) for each in kinds)]

    def once(self, kept: Ledger) -> dict:
        """Single neurons, random weights and halves of the prompts, on the first repetition."""
        scores, chart = self.scores(kept), self.chart(kept)
        found: dict = {"halves of the prompts": self.halves(kept)}
        if self.options.single:
            found["single neurons"] = self.single(chart, scores)
        rows = self.rows(CALIBRATION, 1, 0)
        true = self.scores(self.locate(0, rows))
        found["random weights"] = {}
        own = self.model.network
        for part, prefixes in (("later half", later_half(own)), ("all", ("",))):
            self.model.replace(randomised(own, prefixes))
            wrong = self.scores(self.locate(0, rows))
            self.model.replace(own)
            found["random weights"][part] = {
                name: self.within_sites(true[name], wrong[name]) for name in true if name != "random"
            }
        return found

    def halves(self, kept: Ledger) -> dict[str, float]:
        """Spearman of the scores from half of the prompts against the rest's, dealt out evenly by their lean."""
        chart = self.chart(kept)
        assert kept.leans is not None
        order = kept.leans.sum(1)[:, 0].argsort().tolist()
        parts = []
        for half in (order[::2], order[1::2]):
            count = chart.pooled(kept.count)[half].sum(0)[:, None]
            parts.append({name: chart.pooled(sums.score)[half].sum(0) / count for name, sums in kept.sums.items()})
        return {name: self.within_sites(parts[0][name], parts[1][name]) for name in kept.sums}

    def within_sites(self, one: Tensor, other: Tensor) -> float:
        """Spearman within each site and bin, averaged: that convolutions differ from attention is no evidence."""
        start, found = 0, []
        for site in self.sites:
            span = slice(start, start := start + site.width)
            found.append(spearman(one[:, span], other[:, span]).mean())
        return torch.stack(found).mean().item()

    def single(self, chart: Chart, scores: dict[str, Tensor]) -> dict:
        """Correlation of each method's score with the true effect of silencing a neuron, by kind of site."""
        generator = torch.Generator().manual_seed(0)
        kinds = torch.tensor([self.kinds.index(site.kind) for site in self.sites])
        kind_of = kinds.repeat_interleave(torch.tensor([site.width for site in self.sites]))
        drawn = {}
        for i, kind in enumerate(self.kinds):
            members = (kind_of == i).nonzero().flatten()
            drawn[kind] = members[torch.randperm(len(members), generator=generator)[: self.options.single]]
        together = torch.cat(list(drawn.values()))
        truth = true_effects(self.model, chart, self.held_out(0), together.tolist())
        found: dict = {"neurons": {kind: len(each) for kind, each in drawn.items()}, "pearson": {}, "spearman": {}}
        for name, score in scores.items():
            said = score[:, together]
            parts = dict(
                zip(drawn, torch.arange(len(together)).split([len(each) for each in drawn.values()]), strict=True)
            )
            for what, measure in (("pearson", pearson), ("spearman", spearman)):
                found[what][name] = {k: measure(said[:, i], truth[:, i]).mean().item() for k, i in parts.items()}
                found[what][name]["all"] = measure(said, truth).mean().item()
        return found


def later_half(network: torch.nn.Module) -> tuple[str, ...]:
    """Paths of a U-Net's up path, or of the later half of a transformer's blocks, and of what follows them."""
    if hasattr(network, "up_blocks"):
        return "up_blocks.", "conv_norm_out.", "conv_out."
    stacks = [(name, part) for name, part in network.named_children() if isinstance(part, torch.nn.ModuleList)]
    blocks = [f"{name}.{i}." for name, part in stacks for i in range(len(part))]
    return *blocks[len(blocks) // 2 :], "norm_out.", "proj_out."


def randomised(network: torch.nn.Module, prefixes: tuple[str, ...]) -> torch.nn.Module:
    """A copy whose weights under these paths are dealt out anew within each tensor: their distribution is kept."""
    wrong = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(1)
    for name, value in wrong.named_parameters():
        if name.startswith(prefixes):
            value.data = value.data.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
    return wrong


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """(T, n), (T, n) -> (T,)."""
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp_min(1e-30)


def spearman(one: Tensor, other: Tensor) -> Tensor:
    return pearson(one.argsort(1).argsort(1).double(), other.argsort(1).argsort(1).double())


def stability(rankings: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Spearman of the scores, and overlap of the top 2 %, between repetitions; means over pairs."""
    pairs = [(i, j) for i in range(len(rankings)) for j in range(i)]
    found = {}
    for name in rankings[0]:
        ranks = [spearman(rankings[i][name], rankings[j][name]).mean().item() for i, j in pairs]
        same = [best(rankings[i][name], 0.02) & best(rankings[j][name], 0.02) for i, j in pairs]
        overlap = [each.sum().item() / best(rankings[0][name], 0.02).sum().item() for each in same]
        found[name] = {"spearman": sum(ranks) / len(ranks), "top 2 %": sum(overlap) / len(overlap)}
    return found


if __name__ == "__main__":
    main()
