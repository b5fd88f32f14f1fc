"""Forecasts of silencing: exact where the model is linear, the groups each sample's own, the passes as stated."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.ddtd.conftest import AXIS, THREE, rows

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.composites import COMPOSITES, Composite
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.evaluation.faithfulness import Silencing, Trial, correlation, silenced
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites, neuron_relevance
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row, load_prompts, with_seeds
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

TRIAL = Trial(samples=4, points=2, sizes=(1 / 8, 1 / 2), groups=5)


def silencing(
    model: Model, samples: list[Row] | None = None, axis: Axis = AXIS, sites: tuple[str, ...] = (), names=("gradient",)
) -> Silencing:
    walk = Settings(steps=5, sites=sites)
    return Silencing(model, axis, samples or rows(2, 2), walk, names, TRIAL)


def run(found: Silencing, most: int | None = None, progress: Callable[[int], object] = lambda count: None) -> Silencing:
    found.run(AdaptiveBatch(most), progress)
    return found


@pytest.mark.parametrize("axis", [AXIS, THREE], ids=["two groups", "three groups"])
def test_where_the_prediction_is_linear_in_the_neurons_the_gradient_forecasts_exactly(little: Model, axis: Axis):
    """The channels before the last convolution; a composite of the wrong sign is as wrong as can be."""
    found = silencing(little, axis=axis, sites=("conv_out",))
    gradient = found.composites["gradient"]
    found.composites["wrong"] = replace(gradient, reduce=lambda *given: -neuron_relevance(*given))
    found.forecast["wrong"] = torch.zeros_like(found.truth)
    run(found)
    assert torch.allclose(found.forecast["gradient"], found.truth, rtol=1e-5, atol=1e-7)
    assert found.truth.abs().max() > 0
    best, worst = found.ranking()
    assert (best.composite, worst.composite) == ("gradient", "wrong")
    assert best.correlation.estimate == pytest.approx(1) and worst.correlation.estimate == pytest.approx(-1)
    assert worst.difference is not None and worst.difference.estimate == pytest.approx(-2)


def test_what_is_silenced_is_what_a_mask_silences(unet_once, inputs_once):
    """In one pass with other neurons for each row, and with a mask for each of them."""
    sites, (latents, _, text) = find_sites(unet_once), inputs_once
    generator = torch.Generator().manual_seed(0)
    factors = (torch.rand(2, sum(site.width for site in sites), generator=generator) > 0.3).float()
    plain = unet_once(latents, 500, text).sample
    with silenced(unet_once, sites, factors):
        together = unet_once(latents, 500, text).sample
    for i, factor in enumerate(factors):
        with suppress(unet_once, NeuronMask(sites, torch.tensor([1000.0, 0.0]), factor[None])):
            alone = unet_once(latents[i : i + 1], 500, text[i : i + 1]).sample
        assert torch.allclose(together[i : i + 1], alone, atol=1e-9)
        assert not torch.allclose(plain[i : i + 1], alone, rtol=1e-2)


def test_a_samples_figures_are_its_own(little: Model):
    """Whatever the batch, and whoever else is measured."""
    samples = rows(2, 2)
    whole, parts = run(silencing(little, samples)), run(silencing(little, samples), 1)
    alone = run(silencing(little, samples[1:2]))
    for one in ("truth", "forecast"):
        a, b, c = (each.truth if one == "truth" else each.forecast["gradient"] for each in (whole, parts, alone))
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7) and torch.allclose(a[:, 1:2], c, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("axis", [AXIS, THREE], ids=["two groups", "three groups"])
def test_it_makes_as_many_passes_as_it_says(little: Model, monkeypatch: pytest.MonkeyPatch, axis: Axis):
    found, seen, back, done = silencing(little, axis=axis, names=tuple(COMPOSITES)), [], [], []
    grads = Watch.grads
    monkeypatch.setattr(
        Watch, "grads", lambda self, y, cotangent, retain: back.append(len(y)) or grads(self, y, cotangent, retain)
    )
    conv_in = little.network.conv_in
    handle = conv_in.register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    run(found, progress=done.append)
    handle.remove()
    forward, backward = found.passes()
    walked = len(found.rows) * (found.steps[-1] + 1)
    assert (sum(seen), sum(back)) == (forward + walked, backward)
    assert sum(done) == found.points * (found.silences + len(COMPOSITES))


def test_a_composite_that_does_not_cover_the_model_is_listed(little: Model):
    found = silencing(little)
    bare = replace(found.composites["gradient"], propagation=propagate(Composite("bare", {}), little.network))
    found.composites["bare"], found.forecast["bare"] = bare, torch.zeros_like(found.truth)
    assert [each.composite for each in run(found).ranking()] == ["gradient"]
    assert "has no rule in composite `bare`" in found.refused["bare"]
    found.refused["gradient"] = "for a reason"
    with pytest.raises(InputError, match="no composite can be measured on this model"):
        found.ranking()


def test_the_ranking_pairs_composites_on_the_same_prompts(little: Model):
    samples = rows(4, 2)
    found = silencing(little, samples, names=("gradient", "epsilon-cp", "zplus-cp"))
    noise = torch.Generator().manual_seed(0)
    found.truth = torch.randn(found.truth.shape, generator=noise, dtype=torch.float64)
    for name, much in (("gradient", 1.0), ("epsilon-cp", 0.1), ("zplus-cp", 100.0)):
        found.forecast[name] = found.truth + much * torch.randn(found.truth.shape, generator=noise, dtype=torch.float64)
    best, middle, worst = found.ranking()
    assert [each.composite for each in (best, middle, worst)] == ["epsilon-cp", "gradient", "zplus-cp"]
    assert best.difference is None and best.correlation.low < best.correlation.estimate < best.correlation.high
    for each in (middle, worst):
        assert each.difference.estimate == pytest.approx(each.correlation.estimate - best.correlation.estimate)
        assert each.difference.high < 0
    assert sum(best.by_size) / 2 == pytest.approx(best.correlation.estimate)
    one = silencing(little, samples[:1])
    one.truth, one.forecast["gradient"] = found.truth[:, :1], found.truth[:, :1]
    assert not one.ranking()[0].correlation.has_ends
    one.truth = one.truth * float("nan")
    with pytest.raises(InputError, match="not finite where neurons are silenced"):
        one.ranking()


def test_a_correlation_with_what_does_not_vary_is_none():
    steady, varied = torch.full((3,), 0.3).double(), torch.tensor([1.0, 2.0, 4.0]).double()
    found = correlation(torch.stack([2 * varied + 1, -varied, steady]), varied)
    assert found.tolist() == pytest.approx([1, -1, 0])


def test_a_trial_takes_many_prompts_before_many_seeds():
    prompts = load_prompts("portraits")
    few, many = (
        Trial(samples=6).rows(with_seeds(prompts.take(4), 7, 2)),
        Trial(samples=6).rows(with_seeds(prompts, 7, 2)),
    )
    assert [(row["label"], row["seed"]) for row in few] == [(prompts[i % 4]["label"], 7 + i // 4) for i in range(6)]
    assert [row["label"] for row in many] == [prompts[i * len(prompts) // 6]["label"] for i in range(6)]
    assert Trial(points=3).steps(12) == [2, 6, 10] and Trial(points=3).steps(2) == [0, 1]
    assert Trial(sizes=(1 / 1000, 1 / 2)).counts(100) == [1, 50]
