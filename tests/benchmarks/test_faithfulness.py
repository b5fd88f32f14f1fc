"""What the faithfulness benchmark judges by: laws that its figures must obey on any model."""

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from stereoclinic.ddtd.step import Measured, measure
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.portraits.denoisers import DENOISERS
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds

FAITHFULNESS = Path(__file__).parents[2] / "benchmarks" / "faithfulness"
NAMES = ("common", "attributions", "judge", "run", "show", "shares")
AXIS = load_axis("gender")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    sys.path[:0] = [str(FAITHFULNESS), str(FAITHFULNESS.parent)]
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FAITHFULNESS))
        sys.path.remove(str(FAITHFULNESS.parent))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def point(bench: dict[str, ModuleType], denoiser: Model):
    rows = list(with_seeds(load_prompts("portraits", 2), 0, 1))
    return next(bench["attributions"].points(denoiser, AXIS, rows, 4, 1))


def test_relevance_is_what_locate_measures(bench, point, denoiser: Model) -> None:
    sites = find_sites(denoiser.network)
    found = bench["attributions"].Reading(denoiser.network, sites, point).decomposed("epsilon-cp")

    def measured_with(root: str) -> Measured:
        kept, walk = list[Measured](), Walk(denoiser, point.rows, 4, 1.0, last=1)
        (groups,) = encode_groups(walk, point.rows, [AXIS])
        how = Settings("epsilon-cp", root, steps=4).for_step(denoiser.network)

        def visit(call: Call) -> None:
            kept.append(measure(denoiser, call, groups, sites, point.rows, how)[-1])

        walk.visit = visit
        walk.run()
        return kept[0]

    for name, root in (("epsilon-cp", "plain"), ("epsilon-cp rooted", "rooted")):
        measured = measured_with(root)
        torch.testing.assert_close(found[name].rows, measured.relevance, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found[name].collateral, measured.collateral, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(point.leans, measured.lean)


def test_cad_adds_up_over_a_neuron_s_column_of_weights(bench, point, denoiser: Model) -> None:
    """Gradient x weight, summed over the column, is the neuron's activation x gradient."""
    sites = find_sites(denoiser.network)
    reading = bench["attributions"].Reading(denoiser.network, sites, point)
    found = reading.cad(torch.zeros(1)).rows
    site, start = sites[0], 0
    weight = dict(denoiser.network.named_modules())[site.name].weight
    weight.requires_grad_(True)
    try:
        prediction = point.predict(denoiser.network, point.groups[0])
        size = point.directions[0].square().sum(1, keepdim=True)
        ((prediction - point.prediction).square() / size).sum().backward()
        by_weight = (weight.grad * weight).detach()
    finally:
        weight.grad = None
        weight.requires_grad_(False)
    columns = by_weight.flatten(2).sum(-1).sum(0) if by_weight.ndim == 4 else by_weight.sum(0)
    torch.testing.assert_close(found[0, :, start : start + site.width].sum(0), columns, rtol=1e-5, atol=1e-9)


def test_insertion_of_everything_restores_the_tilt(bench, point, denoiser: Model) -> None:
    sites = find_sites(denoiser.network)
    neurons = sum(site.width for site in sites)
    everything = torch.ones(2, neurons, dtype=torch.bool)
    (all_,) = bench["judge"].inserted(denoiser, sites, [point], [everything])
    assert all_ == pytest.approx(bench["judge"].on_leans(denoiser, [point], None).tilt, rel=1e-6)


def test_silencing_nothing_changes_nothing_and_one_neuron_what_it_says(bench, point, denoiser: Model) -> None:
    judge = bench["judge"]
    sites = find_sites(denoiser.network)
    neurons = sum(site.width for site in sites)
    chart = judge.Chart(sites, torch.tensor([1000.0, 0.0], dtype=torch.float64), [0])
    untreated = judge.on_leans(denoiser, [point], None)
    nothing = judge.on_leans(denoiser, [point], chart.mask(torch.ones(1, neurons)))
    assert nothing == untreated and untreated.off_axis == 0 and untreated.tilt == pytest.approx(untreated.lean)
    factors = torch.ones(1, neurons)
    factors[0, 5] = 0
    damped = judge.on_leans(denoiser, [point], chart.mask(factors))
    (effect,) = judge.true_effects(denoiser, chart, [point], [5])[0].tolist()
    assert effect == pytest.approx(untreated.tilt - damped.tilt, abs=1e-9)


@pytest.mark.parametrize("name", DENOISERS)
def test_random_weights_in_the_later_half_leave_the_earlier_half_as_it_is(bench, name) -> None:
    torch.manual_seed(0)
    kind = DENOISERS[name]
    network = kind.build().eval()
    sites, later = find_sites(network), bench["run"].later_half(network)
    shapes = [(2, 3, kind.widths[0]), *((2, width) for width in kind.widths[1:])]
    inputs = torch.randn(2, 6, 16, 16), torch.tensor([700, 300]), *(torch.randn(shape) for shape in shapes)
    seen = []
    for each in (network, bench["run"].randomised(network, later)):
        with torch.no_grad(), Watch(each, sites) as watch:
            kind.predict(each, *inputs)
        seen.append(dict(watch.activations))
    same = {layer: torch.equal(own, seen[1][layer]) for layer, own in seen[0].items()}
    assert same == {layer: not layer.startswith(later) for layer in same} and len(set(same.values())) == 2


@pytest.mark.parametrize(("name", "kinds"), [("unet", {"ff", "attention", "conv"}), ("flow", {"ff", "attention"})])
def test_every_kind_of_site_of_a_model_is_treated_alone_and_no_other(bench, name, kinds) -> None:
    model = SimpleNamespace(network=DENOISERS[name].build())
    reader = SimpleNamespace(classes={"occupation": ["doctor"]})
    options = SimpleNamespace(bins=5, steps=4, every=2)
    variants = [own for bins, own in bench["run"].Bench(model, reader, AXIS, options).variants() if bins == 5 and own]
    assert {own[0] for own in variants if len(own) == 1} == kinds == {kind for own in variants for kind in own}
    assert all(len(own) < len(kinds) for own in variants)  # all kinds together are no variant


def test_rankings_and_correlations(bench) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert bench["judge"].best(scores, 0.5).tolist() == [[True, False, True, False]]
    assert bench["judge"].best(scores, 0.5, least=True).tolist() == [[False, True, False, True]]
    assert bench["run"].spearman(scores, scores.exp()).item() == pytest.approx(1)
    assert bench["run"].pearson(scores, -scores).item() == pytest.approx(-1)
    mean, half = bench["common"].interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 3)) == (2.0, 2.484)  # t(0.975, 2) = 4.303, over sqrt(3)


def test_area_between_the_curves_of_generated_shares(bench) -> None:
    """One that flips the tilt with its first neurons and keeps it with its last has 2, one that does nothing has 0."""

    def curves(most: float, least: float) -> dict:
        points = {side: [{"share": s, "tilt_left": t} for s in (0.005, 0.02, 0.05)] for side, t in
                  (("most", most), ("least", least))}  # fmt: skip
        return {"methods": {"m": {**points, "inserted": []}}}

    assert bench["shares"].abpc(curves(-1.0, 1.0), "m") == pytest.approx(2)
    assert bench["shares"].abpc(curves(1.0, 1.0), "m") == 0


def test_giving_everything_back_is_the_model_and_nothing_the_balanced_point(bench, point, denoiser: Model) -> None:
    sites = find_sites(denoiser.network)
    neurons = sum(site.width for site in sites)
    judge, network = bench["judge"], denoiser.network
    passes = [partial(point.predict, network, told) for told in point.groups]
    with torch.no_grad():
        balanced = judge.balanced_activations(network, sites, passes)
    found = []
    for kept in (torch.ones(neurons, dtype=torch.bool), torch.zeros(neurons, dtype=torch.bool)):
        with torch.no_grad(), judge.given_back(network, sites, balanced, kept):
            found.append(point.predict(network, point.neutral))
    torch.testing.assert_close(found[0], point.prediction)
    assert not torch.allclose(found[1], point.prediction)
    assert not any(module._forward_pre_hooks for module in denoiser.network.modules())
