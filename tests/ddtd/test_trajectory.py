"""Walking a trajectory: it is the one that is sampled, and each sample's figures are its own."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stereoclinic.axes import Axis, load_axis
from stereoclinic.ddtd import trajectory
from stereoclinic.ddtd.memory import Portions
from stereoclinic.ddtd.neurons import Watch, find_sites, neuron_relevance
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.step import Measured, measure
from stereoclinic.ddtd.target import group_directions, lean
from stereoclinic.ddtd.trajectory import Settings, bin_of, check_prompts, walk
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import sample
from stereoclinic.errors import InputError
from stereoclinic.prompts import group_prompts, load_prompts, with_seeds
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

AXIS = load_axis("gender")
THREE = Axis("age", ("young", "middle", "old"), ("young", "middle-aged", "old"))


@pytest.fixture
def denoiser(little: Denoiser) -> Denoiser:
    return little


def rows(prompts: int = 2, seeds: int = 2) -> list[dict]:
    return list(with_seeds(load_prompts("portraits", prompts), 0, seeds))


def close(one: Tensor, two: Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def looks(groups: int):
    """A classifier of pictures that is smooth and treats each by itself."""
    weights = torch.randn(3 * 64 * 64, groups, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return lambda pictures: (pictures.double().flatten(1) @ weights).tanh()


def test_bins_part_the_timesteps() -> None:
    edges = Settings(bins=5).edges(1000)
    assert [bin_of(t, edges) for t in (1000, 999, 800, 799, 200, 199, 0)] == [0, 0, 0, 1, 3, 4, 4]
    with pytest.raises(InputError, match="fall into 2"):
        Settings(steps=4, every=2, bins=3).check_bins(torch.tensor([999, 749, 499, 249]), edges)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5))
def test_off_axis_rows_that_are_left_out_are_made_up_for(steps: int, bins: int, every: int) -> None:
    """Squares of the weights add up to the number of measured steps of each bin, and each bin has a row."""
    settings = Settings(bins=bins, collateral_every=every)
    edges = settings.edges(1000)
    timesteps = torch.linspace(999, 0, steps)
    weights = torch.tensor(settings.collateral_weights(timesteps, edges))
    held = torch.tensor([bin_of(float(t), edges) for t in timesteps])
    for each in held.unique():
        own = weights[held == each]
        assert own.square().sum().item() == pytest.approx(len(own))
        assert (own > 0).sum() == -(-len(own) // every)


@pytest.mark.parametrize("target", ["lean", "contrast", "guidance", "classifier"])
@pytest.mark.parametrize(
    ("axis", "root", "guidance"), [(AXIS, "plain", 3.0), (AXIS, "rooted", 1.0), (THREE, None, 3.0)]
)
def test_a_batch_equals_single_samples(
    denoiser: Denoiser, axis: Axis, root: str | None, guidance: float, target: str
) -> None:
    sites = find_sites(denoiser.unet, ("ff", "conv"))
    settings = Settings(root=root, steps=2, guidance=guidance, target=target)
    together = list(walk(denoiser, sites, axis, rows(), settings, looks(len(axis))))
    assert len(together) == settings.steps == 2
    for i, row in list(enumerate(rows()))[::3]:
        alone = walk(denoiser, sites, axis, [row], settings, looks(len(axis)))
        for one, all_ in zip(alone, together, strict=True):
            for name in ("lean", "value", "relevance", "means"):
                close(getattr(one, name)[:, 0], getattr(all_, name)[:, i])
            close(one.collateral[0], all_.collateral[i])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("target", ["lean", "guidance"])
def test_the_trajectory_is_the_one_that_is_sampled(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, guidance: float, target: str
) -> None:
    taken: list[Tensor] = []
    step = denoiser.step
    monkeypatch.setattr(denoiser, "step", lambda f, *rest: taken.append(f.detach()) or step(f, *rest))
    settings = Settings(steps=4, every=2, guidance=guidance, target=target)
    list(walk(denoiser, find_sites(denoiser.unet), AXIS, rows(1), settings))
    walked = torch.stack(taken)
    taken.clear()
    sample(denoiser, rows(1), [row["prompt"] for row in rows(1)], 4, guidance)
    torch.testing.assert_close(walked, torch.stack(taken))


def test_whatever_is_decomposed_the_lean_and_the_collateral_are_the_same(denoiser: Denoiser) -> None:
    sites, found = find_sites(denoiser.unet, ("ff",)), {}
    for target in ("lean", "contrast", "guidance", "classifier"):
        settings = Settings(steps=2, every=2, guidance=3.0, target=target)
        found[target] = next(walk(denoiser, sites, AXIS, rows(), settings, looks(2)))
    torch.testing.assert_close(found["lean"].value, found["lean"].lean)
    for target, measured in found.items():
        torch.testing.assert_close(measured.lean, found["lean"].lean, msg=target)
        torch.testing.assert_close(measured.collateral, found["lean"].collateral, msg=target)
        if target != "lean":
            assert not torch.allclose(measured.value, measured.lean)


@pytest.mark.parametrize("root", ["plain", "rooted"])
def test_relevance_along_guidance_is_that_of_both_halves_less_what_any_text_excites(
    denoiser: Denoiser, root: str
) -> None:
    """Each half decomposed by itself toward the same directions: the conditional's relevance minus the other's."""
    sites, samples = find_sites(denoiser.unet), rows()
    settings = Settings("epsilon-cp", root, steps=1, bins=1, target="guidance")
    measured = next(walk(denoiser, sites, AXIS, samples, settings))
    (timestep,) = denoiser.timesteps(1)
    latents = denoiser.noise(samples)
    texts = [[group_prompts(row, AXIS)[k] for row in samples] for k in (0, 1)]
    predictions, activations = [], []
    with torch.no_grad(), Watch(denoiser.unet, sites) as watch:
        for each in texts:
            predictions.append(denoiser.predict(latents, timestep, denoiser.encode(each)))
            activations.append(dict(watch.activations))
    roots = {site.name: (activations[0][site.name] + activations[1][site.name]) / 2 for site in sites}
    _, directions = group_directions(torch.stack(predictions))
    towards = directions[0] / directions[0].flatten(1).square().sum(1)[:, None, None, None]

    def half(prompts: list[str]) -> tuple[Tensor, Tensor]:
        with Watch(denoiser.unet, sites) as watch, propagate("epsilon-cp"):
            f = denoiser.predict(latents.clone().requires_grad_(), timestep, denoiser.encode(prompts))
            grads = torch.autograd.grad(f, [watch.activations[site.name] for site in sites], towards)
            found = neuron_relevance(watch.activations, grads, sites, roots if root == "rooted" else None)
        return (f.detach() * towards).flatten(1).sum(1), found

    (with_text, for_text), (without, for_none) = half([row["prompt"] for row in samples]), half([""] * len(samples))
    torch.testing.assert_close(measured.value[0], with_text - without)
    torch.testing.assert_close(measured.relevance[0], for_text - for_none)
    torch.testing.assert_close(measured.relevance[1], for_none - for_text)


def test_relevance_predicts_what_a_little_damping_does_to_the_lean(denoiser: Denoiser) -> None:
    """With plain gradients a_j g_j is the derivative of the lean in a neuron's factor: damp one site and look."""
    sites = find_sites(denoiser.unet)
    settings = Settings(composite="gradient", steps=1, bins=1)
    measured = next(walk(denoiser, sites, AXIS, rows(), settings))
    spans = torch.tensor([site.width for site in sites]).cumsum(0)
    latents = denoiser.noise(rows())
    (timestep,) = denoiser.timesteps(1)

    @torch.no_grad()
    def predict(prompts: list[str]) -> torch.Tensor:
        return denoiser.predict(latents, timestep, denoiser.encode(prompts))

    groups = group_directions(torch.stack([predict([group_prompts(row, AXIS)[k] for row in rows()]) for k in (0, 1)]))
    neutral = [row["prompt"] for row in rows()]
    before = lean(predict(neutral), *groups)[0]
    for chosen in (0, len(sites) // 2, len(sites) - 1):
        factors = torch.ones(1, int(spans[-1]))
        own = slice(int(spans[chosen]) - sites[chosen].width, int(spans[chosen]))
        factors[:, own] = 0.9999
        mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors, None)
        with suppress(denoiser.unet, mask):
            change = lean(predict(neutral), *groups)[0] - before
        expected = -0.0001 * measured.relevance[0][:, own].sum(1)
        torch.testing.assert_close(change, expected, rtol=0.05, atol=1e-9, check_dtype=False)


def test_the_contrasts_of_three_groups_sum_to_zero(denoiser: Denoiser) -> None:
    """Theirs and their relevance: of directions from the mean of all groups, and of no other point."""
    settings = Settings(steps=1, bins=1, target="contrast")
    measured = next(walk(denoiser, find_sites(denoiser.unet, ("conv",)), THREE, rows(), settings))
    assert measured.lean.shape == (3, 4)
    for each in (measured.value, measured.relevance):
        assert each.shape[0] == 3 and each.abs().max() > 0
        assert each.sum(0).abs().max() <= 1e-5 * each.abs().max()


def test_a_composite_s_own_root_and_a_user_s_own_composite(denoiser: Denoiser, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nroot = "rooted"\n')
    mine = str(tmp_path / "mine.toml")
    sites = find_sites(denoiser.unet, ("conv",))

    def relevance(composite: str, root: str | None) -> Tensor:
        return next(walk(denoiser, sites, AXIS, rows(1, 1), Settings(composite, root, steps=1, bins=1))).relevance

    torch.testing.assert_close(relevance(mine, None), relevance("epsilon-cp", "rooted"))
    torch.testing.assert_close(relevance(mine, "plain"), relevance("epsilon-cp", None))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target": "beauty"}, "target 'beauty' is not known"),
        ({"root": "sideways"}, "expected plain or rooted"),
        ({"classifier_on": "sounds"}, "expected pictures or latents"),
        ({"steps": 0}, "steps 0: expected 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Settings(**settings)


def test_the_target_classifier_needs_one(denoiser: Denoiser) -> None:
    with pytest.raises(InputError, match="no classifier was given"):
        next(walk(denoiser, [], AXIS, rows(1, 1), Settings(target="classifier")))


def test_a_batch_that_does_not_fit_is_parted_and_measures_the_same(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, settings = find_sites(denoiser.unet, ("ff",)), Settings(steps=4, every=2, guidance=3.0)
    whole = list(walk(denoiser, sites, AXIS, rows(), settings))
    asked, said = [], []

    def small(denoiser: Denoiser, sites: list, samples: list[dict], *rest: object) -> tuple[Tensor, Measured]:
        """Four samples never fit; from the second measured step on, two do not either, and the pass fails late."""
        asked.append(len(samples))
        found = measure(denoiser, sites, samples, *rest)  # type: ignore[arg-type]
        if len(samples) > (2 if len(asked) <= 3 else 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(trajectory, "measure", small)
    parted = list(walk(denoiser, sites, AXIS, rows(), settings, portions=Portions(warn=said.append)))
    assert asked == [4, 2, 2, 2, 1, 1, 1, 1]
    assert said == ["4 samples at a time do not fit in memory; going on with 2"]
    for one, two in zip(parted, whole, strict=True):
        for name in ("lean", "value", "relevance", "collateral", "means"):
            close(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_where_they_begin_and_stay_with_their_sample(
    denoiser: Denoiser, value: float
) -> None:
    sites, settings = find_sites(denoiser.unet), Settings(steps=3, guidance=3.0)
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

    clean = list(walk(denoiser, sites, AXIS, rows(), settings))
    with dict(denoiser.unet.named_modules())[site].register_forward_pre_hook(break_one):
        found = list(walk(denoiser, sites, AXIS, rows(), settings))
    assert [list(step.faults) for step in found] == [[], [1], [1]]
    assert found[1].faults == {1: f"activations of {site}"}
    others = [0, 2, 3]
    for one, two in zip(found, clean, strict=True):
        for name in ("lean", "relevance", "means"):
            torch.testing.assert_close(getattr(one, name)[:, others], getattr(two, name)[:, others])
        torch.testing.assert_close(one.collateral[others], two.collateral[others])


def test_relevance_that_overflows_on_the_way_back_is_named_where_it_begins(denoiser: Denoiser) -> None:
    sites = find_sites(denoiser.unet)
    with Watch(denoiser.unet, sites) as watch:
        next(walk(denoiser, sites, AXIS, rows(1, 1), Settings(steps=1, bins=1)))
        order = list(watch.activations)
    chosen = order[len(order) // 2]

    def blow_up(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), torch.inf))

    with dict(denoiser.unet.named_modules())[chosen].register_forward_hook(blow_up):
        measured = next(walk(denoiser, sites, AXIS, rows(), Settings(steps=1, bins=1)))
    assert measured.faults == {2: f"relevance of {chosen}"}


def test_prompts_that_the_model_cannot_tell_apart_are_refused(denoiser: Denoiser) -> None:
    check_prompts(denoiser, AXIS, rows())
    same = Axis("gender", ("female", "male"), ("young", "young"))
    with pytest.raises(InputError, match=r"'a photo of a young doctor' is the same as .* so the axis has no direction"):
        check_prompts(denoiser, same, rows())
    long = [{**rows(1, 1)[0], "prompt": "photo " * 90, "pattern": "photo " * 90 + "{person}"}]
    with pytest.raises(InputError, match="not too long for the model"):
        check_prompts(denoiser, AXIS, long)


def test_a_model_that_does_not_read_the_text_has_no_direction(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = denoiser.predict
    monkeypatch.setattr(denoiser, "predict", lambda x, t, states: predict(x, t, torch.zeros_like(states)))
    with pytest.raises(InputError, match="predicts the same for every group's prompt"):
        next(walk(denoiser, find_sites(denoiser.unet), AXIS, rows(1, 1), Settings(steps=1)))


def test_a_compiled_unet_is_watched_as_it_was_written(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code would not see the hooks; steps that are not measured may run it."""
    sites, settings = find_sites(denoiser.unet, ("ff",)), Settings(steps=1, bins=1, guidance=3.0)
    plain = next(walk(denoiser, sites, AXIS, rows(1), settings))
    compiled: list[object] = []
    monkeypatch.setattr(denoiser, "unet", torch.compile(denoiser.unet, backend=lambda graph, _: compiled.append(graph)))
    measured = next(walk(denoiser, sites, AXIS, rows(1), settings))
    torch.testing.assert_close(measured.relevance, plain.relevance)
    torch.testing.assert_close(measured.means, plain.means)
    assert not compiled


def test_inference_mode_is_refused(denoiser: Denoiser) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        next(walk(denoiser, find_sites(denoiser.unet), AXIS, rows(), Settings(steps=1)))
