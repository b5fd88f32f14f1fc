"""One measured step: each sample's figures are its own, add up, and predict what damping does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ddtd.conftest import AXIS, THREE, close, measured, rows
from tests.pipelines.tiny import build
from tests.pipelines.tiny_table import SMALL
from torch import Tensor, nn

from stereoclinic.ddtd.lean import group_directions, lean
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import Conditions
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites, neuron_relevance, spans
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Row
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask


def looks(groups: int) -> Callable[[Tensor], Tensor]:
    """A classifier of pictures that is smooth and treats each by itself."""
    weights = torch.randn(3 * 64 * 64, groups, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return lambda pictures: (pictures.double().flatten(1) @ weights).tanh()


def at_the_first_step(
    model: Model, samples: list[Row], visit: Callable[[Call, list[Conditions]], Any], guidance: float = 1.0
) -> Any:
    """What a visitor gives at the first of one step, handed the conditions of both groups."""
    found = []
    walk = Walk(model, samples, 1, guidance, visit=lambda call: found.append(visit(call, groups)), last=1)
    (groups,) = encode_groups(walk, samples, [AXIS])
    walk.run()
    return found[0]


@pytest.mark.parametrize("target", ["lean", "contrast", "guidance", "classifier"])
@pytest.mark.parametrize(
    ("axis", "root", "guidance"), [(AXIS, "plain", 3.0), (AXIS, "rooted", 2.0), (THREE, None, 3.0)]
)
def test_a_batch_equals_single_samples(
    little: Model, axis: Axis, root: str | None, guidance: float, target: str
) -> None:
    sites = find_sites(little.network, ("ff", "conv"))
    settings = Settings(root=root, steps=2, guidance=guidance, target=target)
    together = measured(little, sites, axis, rows(), settings, looks(len(axis)))
    assert len(together) == settings.steps == 2
    for i, row in list(enumerate(rows()))[::3]:
        alone = measured(little, sites, axis, [row], settings, looks(len(axis)))
        for one, all_ in zip(alone, together, strict=True):
            for name in ("lean", "value", "relevance", "means"):
                close(getattr(one, name)[:, 0], getattr(all_, name)[:, i])
            close(one.collateral[0], all_.collateral[i])


def test_whatever_is_decomposed_the_lean_and_the_collateral_are_the_same(little: Model) -> None:
    sites, found = find_sites(little.network, ("ff",)), {}
    for target in ("lean", "contrast", "guidance", "classifier"):
        settings = Settings(steps=2, every=2, guidance=3.0, target=target)
        found[target] = measured(little, sites, AXIS, rows(), settings, looks(2))[0]
    torch.testing.assert_close(found["lean"].value, found["lean"].lean)
    for target, step in found.items():
        torch.testing.assert_close(step.lean, found["lean"].lean, msg=target)
        torch.testing.assert_close(step.collateral, found["lean"].collateral, msg=target)
        if target != "lean":
            assert not torch.allclose(step.value, step.lean)


@pytest.mark.parametrize("root", ["plain", "rooted"])
def test_relevance_along_guidance_is_that_of_both_halves_less_what_any_text_excites(little: Model, root: str) -> None:
    """Each half decomposed by itself toward the same directions: the conditional's relevance minus the other's."""
    sites, samples = find_sites(little.network), rows()
    settings = Settings("epsilon-cp", root, steps=1, bins=1, guidance=3.0, target="guidance")
    (step,) = measured(little, sites, AXIS, samples, settings)

    def halves(call: Call, groups: list[Conditions]) -> list[tuple[Tensor, Tensor]]:
        predictions, activations = [], []
        with torch.no_grad(), Watch(little.network, sites) as watch:
            for conditions in groups:
                predictions.append(call.predict(conditions))
                activations.append(dict(watch.activations))
        roots = {name: (activations[0][name] + activations[1][name]) / 2 for name in activations[0]}
        _, directions = group_directions(torch.stack(predictions))
        towards = directions[0] / directions[0].square().sum(1, keepdim=True)

        def half(conditional: bool) -> tuple[Tensor, Tensor]:
            given = call.arguments(None, slice(None), conditional)
            with torch.enable_grad(), Watch(little.network, sites) as watch, propagate("epsilon-cp"):
                f = call.run(given, slice(None), True, conditional)
                grads = watch.grads(f, towards, retain=False)
                found = neuron_relevance(watch.activations, grads, sites, roots if root == "rooted" else None)
            return (f.detach() * towards).sum(1), found

        return [half(True), half(False)]

    (with_text, for_text), (without, for_none) = at_the_first_step(little, samples, halves, guidance=3.0)
    torch.testing.assert_close(step.value[0], with_text - without)
    torch.testing.assert_close(step.relevance[0], for_text - for_none)
    torch.testing.assert_close(step.relevance[1], for_none - for_text)


def test_relevance_predicts_what_a_little_damping_does_to_the_lean(little: Model) -> None:
    """With plain gradients a_j g_j is the derivative of the lean in a neuron's factor: damp one site and look."""
    sites = find_sites(little.network)
    (step,) = measured(little, sites, AXIS, rows(), Settings(composite="gradient", steps=1, bins=1))
    parts, masks = list(spans(sites)), []
    for chosen in (0, len(sites) // 2, len(sites) - 1):
        factors = torch.ones(1, parts[-1][1].stop)
        factors[:, parts[chosen][1]] = 0.9999
        mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors, None)
        masks.append((factors, suppress(little, mask)))

    def changes(call: Call, groups: list[Conditions]) -> list[tuple[Tensor, Tensor]]:
        balance = group_directions(call.compare(groups))
        before, found = lean(call.predict(), *balance)[0], []
        for factors, damped in masks:
            with damped:
                found.append((factors, lean(call.predict(), *balance)[0] - before))
        return found

    for factors, change in at_the_first_step(little, rows(), changes):
        expected = -0.0001 * (step.relevance[0] * (factors < 1)).sum(1)
        torch.testing.assert_close(change, expected, rtol=0.05, atol=1e-9, check_dtype=False)
        assert change.abs().max() > 1e-8


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_relevance_reaches_every_site(name: str) -> None:
    """No uncovered operation, the same prediction bit for bit, and relevance in every site."""
    model = Model(build(name), call=SMALL)
    sites = find_sites(model.network)

    def decompose(call: Call, groups: list[Conditions]) -> Tensor:
        plain = call.predict()
        with torch.enable_grad(), Watch(model.network, sites) as watch:
            with propagate("epsilon-cp"):
                prediction = call.predict()
            grads = watch.grads(prediction, prediction.detach(), retain=False)
        assert torch.equal(prediction, plain)
        return neuron_relevance(watch.activations, grads, sites)

    found = at_the_first_step(model, rows(2, 1), decompose)
    assert found.shape == (2, sum(site.width for site in sites))
    for site, span in spans(sites):
        assert found[:, span].isfinite().all() and (found[:, span] != 0).any(), site.name


def test_the_contrasts_of_three_groups_sum_to_zero(little: Model) -> None:
    """Theirs and their relevance: of directions from the mean of all groups, and of no other point."""
    settings = Settings(steps=1, bins=1, target="contrast")
    (step,) = measured(little, find_sites(little.network, ("conv",)), THREE, rows(), settings)
    assert step.lean.shape == (3, 4)
    for each in (step.value, step.relevance):
        assert each.shape[0] == 3 and each.abs().max() > 0
        assert each.sum(0).abs().max() <= 1e-5 * each.abs().max()


def test_a_composite_s_own_root_and_a_user_s_own_composite(little: Model, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nroot = "rooted"\n')
    mine = str(tmp_path / "mine.toml")
    sites = find_sites(little.network, ("conv",))

    def relevance(composite: str, root: str | None) -> Tensor:
        return measured(little, sites, AXIS, rows(1, 1), Settings(composite, root, steps=1, bins=1))[0].relevance

    torch.testing.assert_close(relevance(mine, None), relevance("epsilon-cp", "rooted"))
    torch.testing.assert_close(relevance(mine, "plain"), relevance("epsilon-cp", None))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_where_they_begin_and_stay_with_their_sample(
    little: Model, value: float
) -> None:
    sites, settings = find_sites(little.network), Settings(steps=3, bins=3, guidance=3.0)
    site = sites[len(sites) // 2].name
    calls = 0

    def break_one(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the second step on, sample 1 of 4, in whatever pass."""
        nonlocal calls
        calls += 1
        if calls <= 2:  # the group passes and the watched one of the first step
            return args
        broken = args[0].clone()
        broken[1::4] = value
        return (broken, *args[1:])

    clean = measured(little, sites, AXIS, rows(), settings)
    with little.network.get_submodule(site).register_forward_pre_hook(break_one):
        found = measured(little, sites, AXIS, rows(), settings)
    assert [list(step.faults) for step in found] == [[], [1], [1]]
    assert found[1].faults == {1: f"activations of {site}"}
    others = [0, 2, 3]
    for one, two in zip(found, clean, strict=True):
        for name in ("lean", "relevance", "means"):
            torch.testing.assert_close(getattr(one, name)[:, others], getattr(two, name)[:, others])
        torch.testing.assert_close(one.collateral[others], two.collateral[others])


def test_relevance_that_overflows_on_the_way_back_is_named_where_it_begins(little: Model) -> None:
    sites = find_sites(little.network)
    with Watch(little.network, sites) as watch:
        measured(little, sites, AXIS, rows(1, 1), Settings(steps=1, bins=1))
        order = list(watch.activations)
    chosen = order[len(order) // 2]

    def blow_up(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), torch.inf))

    with little.network.get_submodule(chosen).register_forward_hook(blow_up):
        (step,) = measured(little, sites, AXIS, rows(), Settings(steps=1, bins=1))
    assert step.faults == {2: f"relevance of {chosen}"}


def test_a_model_that_does_not_read_the_text_has_no_direction(little: Model) -> None:
    def deafen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "encoder_hidden_states": torch.zeros_like(kwargs["encoder_hidden_states"])}

    deaf = little.network.register_forward_pre_hook(deafen, with_kwargs=True)
    with deaf, pytest.raises(InputError, match="predicts the same for every group's prompt"):
        measured(little, find_sites(little.network), AXIS, rows(1, 1), Settings(steps=1))


def test_a_compiled_unet_is_watched_as_it_was_written(little: Model) -> None:
    """Compiled code would not see the hooks; steps that are not measured may run it."""
    sites, settings = find_sites(little.network, ("ff",)), Settings(steps=1, bins=1, guidance=3.0)
    (plain,) = measured(little, sites, AXIS, rows(1), settings)
    ran, unet = 0, little.network

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph.forward(*args)

        return run

    little.replace(torch.compile(unet, backend=backend))
    try:
        learnt_of(little, 3.0)
        settings.timesteps(little)
        assert ran
        ran = 0
        (step,) = measured(little, sites, AXIS, rows(1), settings)
    finally:
        little.replace(unet)
        torch.compiler.reset()
    torch.testing.assert_close(step.relevance, plain.relevance)
    torch.testing.assert_close(step.means, plain.means)
    assert not ran
