"""Comparators: each does what its formula says, is told by its key, and leaves the model bit for bit as it was."""

import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.pipelines.tiny import TINY, build
from torch import Tensor
from torch.nn import functional

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods import (
    BASELINES,
    baseline_class,
    calibration_samples,
    check_names,
    concept_prune,
    equisteer,
    h_space,
    icm,
    uce,
)
from stereoclinic.evaluation.methods.baseline import attention_blocks, nearest, unit
from stereoclinic.evaluation.methods.calibration import Calibration, Look, Run
from stereoclinic.evaluation.methods.oracles import AllocationOracle
from stereoclinic.io.digest import weights_digest
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.conditions import encode
from stereoclinic.pipelines.intercept import Left
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import group_prompts, load_prompts, with_seeds

AXIS = load_axis("gender")
STEPS = 3
NEUTRAL, GROUPED = "a photo of a doctor", "a photo of a female doctor"
SMALL = {"h-space": h_space.DirectionSettings(updates=3, batch=2), "uce": uce.EditSettings(rounds=2, eta=1.0)}


class Alternating:
    """Sees another group in every other picture, whatever is on it, and the last of three pictures as the first's."""

    name, classes = "alternating", {"gender": AXIS.groups}

    def read(self, images: Tensor) -> dict[str, Tensor]:
        odd = torch.arange(len(images)) % 3 == 1
        return {"gender": torch.stack([~odd, odd], dim=1).float()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tests.cli.conftest import write_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, seed=0)
    return open_model(folder)


@pytest.fixture(scope="module")
def samples() -> list[dict]:
    return calibration_samples(load_prompts("portraits", 2), 100, 3, range(5000, 5010))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(with_seeds(load_prompts("portraits", 2), 40, 2))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(STEPS, 2.0, Alternating(), batch_size=4)


@pytest.fixture(scope="module")
def fitted(model, samples, calibration) -> Callable:
    made: dict = {}

    def fit(name: str):
        if name not in made:
            made[name] = baseline_class(name).fit(model, AXIS, samples, calibration, settings=SMALL.get(name))
        return made[name]

    return fit


def draw(model: Model, mitigation, rows: list[dict], guidance: float = 2.0, most: int | None = None) -> Tensor:
    """Latents of the pictures."""
    with mitigation, torch.no_grad():
        prompts = mitigation.begin(rows).prompts
        return Walk(model, rows, STEPS, guidance, prompts, portions=AdaptiveBatch(most)).run("latent").images


def untreated(model: Model, rows: list[dict], guidance: float = 2.0) -> Tensor:
    with torch.no_grad():
        return Walk(model, rows, STEPS, guidance).run("latent").images


names = pytest.mark.parametrize("name", list(BASELINES))
steered = pytest.mark.parametrize("name", [name for name in BASELINES if name != "prompt"])


@names
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pictures_change_inside_and_the_model_is_as_it_was_outside(model, fitted, rows, name, guidance):
    digest, before, mitigation = weights_digest(model.network), untreated(model, rows, guidance), fitted(name)
    inside = draw(model, mitigation, rows, guidance)
    assert inside.shape == before.shape and inside.isfinite().all() and not torch.equal(inside, before)
    assert torch.equal(untreated(model, rows, guidance), before) and weights_digest(model.network) == digest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.network.modules())
    assert torch.equal(draw(model, mitigation, rows, guidance), inside)


@steered
def test_the_model_is_as_it_was_after_an_exception_and_cannot_be_entered_twice(model, fitted, rows, name):
    digest, mitigation = weights_digest(model.network), fitted(name)
    with pytest.raises(ZeroDivisionError), mitigation:
        with pytest.raises(RuntimeError, match="active already"):
            mitigation.__enter__()
        raise ZeroDivisionError
    assert weights_digest(model.network) == digest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.network.modules())


@pytest.mark.parametrize("name", ["conceptprune", "uce", "h-space", "icm"])  # equisteer clears the axis all the same
def test_a_strength_of_nothing_changes_nothing(model, samples, calibration, rows, name):
    kind = baseline_class(name)
    nothing = replace(SMALL.get(name, kind.defaults), strength=0.0)
    mitigation = kind.fit(model, AXIS, samples, calibration, settings=nothing)
    assert torch.allclose(draw(model, mitigation, rows), untreated(model, rows), atol=1e-5)


@names
def test_a_picture_depends_on_its_own_row_alone(model, fitted, rows, name):
    """Also where its batch does not fit in memory, and is parted."""
    together, mitigation = draw(model, fitted(name), rows), fitted(name)
    alone = torch.cat([draw(model, mitigation, [row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, draw(model, mitigation, rows, most=3), atol=1e-4)


@names
def test_a_fit_is_the_same_again_and_says_what_it_cost(model, fitted, samples, calibration, name):
    first, counted = fitted(name), []
    settings = SMALL.get(name)
    again = baseline_class(name).fit(model, AXIS, samples, calibration, lambda *done: counted.append(done), settings)
    assert first.key() == again.key() and first.cost.images == again.cost.images
    assert sum(count for _, count in counted) == again.cost.images
    assert {who for who, _ in counted} <= {again.name} and again.needs and again.source
    drawn = {"prompt": 0, "conceptprune": 3, "uce": 2, "h-space": 2, "equisteer": 3, "icm": 1}[name]
    assert again.cost.images == drawn * len(samples)
    # The gate's; the updates'; the texts': two prompts, each with those of its groups, and what is kept.
    extra = {"equisteer": 3 * len(samples), "h-space": 2 * (1 + 3 * 2), "uce": 2 * (1 + 2) + (2 * 2 + 1)}
    assert again.cost.forward == again.cost.images * STEPS * 2 + extra.get(name, 0)
    assert again.cost.backward == (2 * 3 * 2 if name == "h-space" else 0)


def test_keys_tell_comparators_apart_and_follow_what_changes_pictures(model, fitted, samples, calibration):
    keys = {name: fitted(name).key() for name in BASELINES}
    assert len(set(keys.values())) == len(keys)
    for name in BASELINES:
        kind = baseline_class(name)
        uneven = replace(calibration, shares={"female": 0.3, "male": 0.7})
        other = kind.fit(model, AXIS, samples, uneven, settings=SMALL.get(name))
        assert other.key() != keys[name], name
    for name in ("h-space", "icm", "equisteer", "conceptprune"):
        mitigation = fitted(name)
        kept, mitigation.strength = mitigation.strength, mitigation.strength + 0.5
        assert mitigation.key() != keys[name]
        mitigation.strength = kept
        tensor = list(mitigation.state()[0].values())[-1]
        before = tensor.clone()
        tensor.copy_(tensor.logical_not() if tensor.dtype == torch.bool else tensor + 1)
        assert mitigation.key() != keys[name]
        tensor.copy_(before)
        mitigation.name, kept = "of another name", mitigation.name
        assert mitigation.key() == keys[name]  # the same pictures
        mitigation.name = kept


# Groups


def test_allotments_follow_the_shares_from_each_rows_own_seed(model, samples, calibration):
    uneven = replace(calibration, shares={"female": 1.0, "male": 0.0})
    for name in ("prompt", "h-space", "equisteer", "icm"):
        made = baseline_class(name).fit(model, AXIS, samples, uneven, settings=SMALL.get(name))
        assert made.begin(samples).allotted.tolist() == [0] * len(samples)


def test_prompt_allocation_is_the_oracle_but_for_prompts_that_name_a_group(fitted, rows):
    oracle, mitigation = AllocationOracle(AXIS), fitted("prompt")
    assert mitigation.begin(rows).prompts == oracle.begin(rows).prompts
    assert torch.equal(mitigation.begin(rows).allotted, oracle.begin(rows).allotted)
    assert mitigation.key() != oracle.key()  # they differ on these:
    named = [{**row, "prompt": prompt} for row in rows for prompt in group_prompts(row, AXIS)]
    batch = mitigation.begin(named)
    assert batch.prompts == [row["prompt"] for row in named] and (batch.allotted == -1).all()


def test_concept_prune_leaves_balanced_and_unknown_prompts_alone(model, fitted, rows):
    mitigation = fitted("conceptprune")
    kept, mitigation.over = mitigation.over, {rows[0]["prompt"]: 0}
    try:
        drawn, before = draw(model, mitigation, rows), untreated(model, rows)
        same = [torch.equal(a, b) for a, b in zip(drawn, before, strict=True)]
        assert same == [row["prompt"] != rows[0]["prompt"] for row in rows]
        # A group's prompt is drawn with the weights of its neutral one.
        assert mitigation.begin([{**rows[0], "prompt": GROUPED}]).prompts == [GROUPED]
        assert mitigation._groups.tolist() == [0]
    finally:
        mitigation.over = kept


def test_equisteers_gate_leaves_prompts_over_a_threshold_alone_bit_for_bit(model, fitted, rows):
    mitigation = fitted("equisteer")
    kept = mitigation.thresholds
    try:
        mitigation.thresholds = torch.full_like(kept, -1e9)
        assert torch.equal(draw(model, mitigation, rows), untreated(model, rows))
        mitigation.thresholds = torch.full_like(kept, 1e9)
        assert not torch.equal(draw(model, mitigation, rows), untreated(model, rows))
    finally:
        mitigation.thresholds = kept


def test_only_the_images_that_were_begun_are_reached(model, fitted, rows):
    """In no pass that is for comparison, nor in any that nobody watches."""
    mitigation, seen = fitted("h-space"), []

    def visit(call: Call) -> None:
        seen.append([call.predict(treated=treated) for treated in (True, False)])
        raise Left

    with mitigation, torch.no_grad():
        mitigation.begin(rows)
        Walk(model, rows, STEPS, 2.0, visit=visit).run()
        mitigation.begin(rows[:-1])
        with pytest.raises(InputError, match="4 images are drawn, and 3 were begun"):
            Walk(model, rows, STEPS, 2.0).run()
        with pytest.raises(InputError, match=r"h-space acts on images that `pipelines.images.draw` draws"):
            model.pipe("a photo of a doctor", num_inference_steps=1)
    with torch.no_grad():
        Walk(model, rows, STEPS, 2.0, visit=visit).run()
    (inside, compared), (outside, _) = seen
    assert torch.equal(compared, outside) and not torch.equal(inside, outside)


def test_the_nearest_calibrated_timestep():
    assert nearest(torch.tensor([900.0, 500.0, 100.0]), 620) == 1


# Other pipelines


@pytest.fixture(scope="module")
def tiny_model() -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            made[name] = Model(build(name), name, call=dict(TINY[name].call))
        return made[name]

    return make


@pytest.mark.parametrize(
    ("kind", "name"),
    [("pixart-sigma", name) for name in ("conceptprune", "uce", "equisteer", "icm")]
    + [("sdxl", name) for name in ("uce", "h-space")]  # told sizes and pooled text beside the states
    + [("flux2-klein", "conceptprune"), ("flux", "conceptprune")],  # guides in two calls; has layers that kinds share
)
def test_baselines_of_other_pipelines(tiny_model, calibration, kind: str, name: str):
    model, guidance = tiny_model(kind), TINY[kind].guidance
    prompts = [f"a photo of a {person}" for person in ("doctor", "nurse")]
    samples = [{"prompt": p, "pattern": "a photo of {person}", "article": "a", "person": p.split()[-1], "seed": seed}
               for seed in (7, 8, 9) for p in prompts]  # fmt: skip
    rows = samples[:2]
    how = replace(calibration, guidance=guidance)
    digest, before = weights_digest(model.network), untreated(model, rows, guidance)
    made = baseline_class(name).fit(model, AXIS, samples, how, settings=SMALL.get(name))
    if name == "conceptprune":
        made.over = {prompts[0]: 0}
    elif name == "equisteer":
        made.thresholds = torch.full_like(made.thresholds, 1e9)  # the gate is open
    inside = draw(model, made, rows, guidance)
    assert inside.isfinite().all() and not torch.equal(inside[0], before[0])
    assert torch.equal(inside[1], before[1]) == (name == "conceptprune")
    assert torch.equal(untreated(model, rows, guidance), before) and weights_digest(model.network) == digest
    scale = before.abs().max()
    alone = torch.cat([draw(model, made, [row], guidance) for row in rows])
    for other in (alone, draw(model, made, rows, guidance, most=1)):
        assert torch.allclose(inside, other, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("flux", "h-space", "h-space: this FluxTransformer2DModel has no mid_block to add a vector at"),
        (
            "flux",
            "uce",
            "UCE needs separate cross-attention, which this FluxTransformer2DModel .* ends in attn2",
        ),
        ("flux", "equisteer", "EquiSteer needs separate cross-attention"),
        (
            "flux",
            "icm",
            "ICM needs separate self-attention, which this FluxTransformer2DModel .* ends in attn1",
        ),
        (
            "sd3",
            "equisteer",
            "EquiSteer needs separate cross-attention",
        ),  # its attn2 is not that
        ("sana", "conceptprune", "ConceptPrune: no feed-forward block of this SanaTransformer2DModel ends in a linear"),
        ("kandinsky3", "h-space", "h-space: this Kandinsky3UNet has no mid_block"),
        ("cogview4", "icm", r"ICM: .*\.attn1 has no row for each of the"),  # of text and image together
        ("lumina", "icm", r"ICM: .*\.attn1 gives .*; expected rows, positions and channels"),
        ("lumina", "uce", "UCE: the blocks of this LuminaNextDiT2DModel read different text states"),
    ],
)
def test_baselines_say_what_a_pipeline_lacks(tiny_model, samples, calibration, kind: str, name: str, says: str):
    how = replace(calibration, guidance=TINY[kind].guidance)
    with pytest.raises(InputError, match=says):
        baseline_class(name).fit(tiny_model(kind), AXIS, samples, how)


def test_a_pass_that_ran_out_of_memory_is_not_counted(model, samples, calibration):
    """Its rows go through once more, and what is kept of each sample is kept once."""

    def kept(most: int | None, fails: bool) -> Tensor:
        run = Run("test", model, AXIS, samples, calibration)
        run.portions.most = most
        name = next(name for name, _ in model.network.named_modules() if name.endswith("attn1"))
        total = torch.zeros(len(samples))

        def keep(samples: list[int], step: int, name: str, found: Tensor) -> None:
            total.index_add_(0, torch.tensor(samples), found)

        def fail(module, args, output) -> None:
            if fails and len(output) > 4:
                raise torch.OutOfMemoryError

        look = Look({name: model.network.get_submodule(name)}, lambda name, o: o.flatten(1).norm(dim=1), keep)
        with model.network.conv_out.register_forward_hook(fail) if fails else nullcontext():
            run.draw(run.neutral, look)
        assert run.cost.forward == 2 * STEPS * len(samples)
        return total

    whole = kept(None, fails=False)
    assert (whole > 0).all()
    assert torch.allclose(kept(None, fails=True), whole) and torch.allclose(kept(1, fails=False), whole)


# Formulas


def test_wanda_scores_by_hand():
    weight, norm = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([3.0, 0.25])
    assert concept_prune.wanda(weight, norm).tolist() == [[3.0, 0.5], [1.5, 0.0]]


def test_skilled_weights_are_the_top_of_their_row_and_above_the_base_at_some_step():
    weight = torch.tensor([[1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, -9.0]])
    target = torch.tensor([[1.0, 1.0, 2.0, 1.0], [5.0, 1.0, 1.0, 1.0]])
    base = torch.tensor([[0.5, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 2.0]])
    #   step 0: tops of the rows are (0, 1) and (1, 3), both excited more by the base; step 1: (0, 0) and (1, 3)
    assert concept_prune.skilled(weight, target, base, 0.25).nonzero().tolist() == [[0, 0]]
    #   two a row, step 0: (0, 1), (0, 2) and (1, 3), (1, 2); step 1: (0, 0), (0, 1) and (1, 3), (1, 0)
    assert concept_prune.skilled(weight, target, base, 0.5).nonzero().tolist() == [[0, 0], [0, 2], [1, 0], [1, 2]]


def test_pruning_by_hook_is_pruning_the_weights(model, fitted, rows):
    mitigation = fitted("conceptprune")
    kept, mitigation.over = mitigation.over, {row["prompt"]: 1 for row in rows}
    by_hook = draw(model, mitigation, rows)
    mitigation.over = kept
    weights = {name: model.network.get_submodule(name).weight for name in mitigation.masks}
    originals = {name: weight.data.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data[mitigation.masks[name][1]] = 0
        assert torch.allclose(by_hook, untreated(model, rows), atol=1e-4)
    finally:
        for name, weight in weights.items():
            weight.data.copy_(originals[name])


def test_uces_closed_form_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    w, c, v, p = (torch.randn(*shape, generator=generator).double() for shape in ((5, 7), (3, 7), (3, 5), (4, 7)))
    lamb, preserve = 0.3, 0.8
    left = np.vstack([c.numpy(), math.sqrt(preserve) * p.numpy(), math.sqrt(lamb) * np.eye(7)])
    right = np.vstack([v.numpy(), math.sqrt(preserve) * (p @ w.T).numpy(), math.sqrt(lamb) * w.T.numpy()])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.allclose(uce.closed_form(w, c, v, p, lamb, preserve).numpy(), expected)
    assert torch.allclose(uce.closed_form(w, c, c @ w.T, p, lamb, preserve), w)  # nothing asked for, nothing changed


def test_uces_values_move_by_alpha_along_the_attributes():
    w, c = torch.eye(2).double(), torch.tensor([[3.0, 4.0]]).double()
    a = torch.tensor([[[2.0, 0.0]], [[0.0, 7.0]]]).double()
    alpha = torch.tensor([0.1, -0.2], dtype=torch.float64)
    assert uce.target_values(w, c, a, alpha).tolist() == [[3.5, 3.0]]


def test_uce_edits_the_text_from_its_last_word_on(model, samples, calibration):
    run = Run("UCE", model, AXIS, samples, calibration)
    blocks = attention_blocks(run.network, cross=True, who="UCE")
    c, a = uce._concepts(run, blocks, [NEUTRAL], [[GROUPED], ["a photo of a male doctor"]])
    states = encode(model, [NEUTRAL, GROUPED], 2.0)[0].rows["encoder_hidden_states",]
    assert torch.allclose(uce._states(run, blocks, [NEUTRAL, GROUPED]), states, atol=1e-6)
    # <start> a photo of a doctor <end>: the word is the sixth token, and the seventh with a group before it
    assert c[0].shape[0] == states.shape[1] - 6 and a[0].shape == (2, *c[0].shape)
    assert torch.allclose(c[0].float(), states[0, 5:-1], atol=1e-6)
    assert torch.allclose(a[0][0].float(), states[1, 6:], atol=1e-6)


def test_uce_stops_where_pictures_are_balanced(model, samples, calibration):
    class Balanced(Alternating):
        def read(self, images: Tensor) -> dict[str, Tensor]:
            return {"gender": torch.eye(2)[torch.arange(len(images)) // 2 % 2]}  # of two prompts: each half and half

    even = samples[:4]
    made = uce.UnifiedConceptEditing.fit(model, AXIS, even, replace(calibration, reader=Balanced()))
    assert made.cost.images == len(even)
    assert all(torch.equal(w, model.network.get_submodule(name).weight) for name, w in made.edited.items())


def test_h_space_shifts_the_middle_blocks_output_by_exactly_the_vector(model, fitted, rows):
    mitigation, seen = fitted("h-space"), []

    def outputs() -> Tensor:
        """Of the first step, whose latents are the same."""
        late = lambda module, args, output: seen.append(output)  # noqa: E731
        with torch.no_grad(), model.network.mid_block.register_forward_hook(late):
            Walk(model, rows, STEPS, 2.0, last=1).run()
        return seen.pop()

    before = outputs()
    with mitigation:
        groups = mitigation.begin(rows).allotted
        after = outputs()
    conditional = len(rows)
    assert torch.equal(after[:conditional], before[:conditional])
    assert torch.equal(after[conditional:], before[conditional:] + mitigation.strength * mitigation.vectors[groups])


def test_h_spaces_vector_lowers_the_loss_and_leaves_the_model_without_gradients(model, samples, calibration):
    run = Run("h-space", model, AXIS, samples, calibration)
    clean = run.latents(run.group(0))
    vector = h_space.learned(run, clean, h_space.DirectionSettings(updates=30, batch=6))
    scheduler = h_space.DDPMScheduler.from_config(model.pipe.scheduler.config)
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(1000, (6,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    target, predict = scheduler.get_velocity(clean, noise, t), h_space._predictor(run)

    @torch.no_grad()
    def loss(added: Tensor) -> float:
        with model.network.mid_block.register_forward_hook(lambda module, args, output: output + added):
            found = predict(scheduler.add_noise(clean, noise, t), t, list(range(len(clean))))
        return functional.mse_loss(found, target).item()

    assert loss(vector) < loss(torch.zeros_like(vector))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.network.parameters())


def test_what_is_cleared_is_orthogonal_to_every_direction():
    generator = torch.Generator().manual_seed(0)
    s = unit(torch.randn(3, 8, generator=generator).double())
    s[2] = unit(s[0] + 2 * s[1])  # three directions that span two
    rows = equisteer.basis(s)
    o = torch.randn(4, 5, 8, generator=generator).double()
    left = equisteer.cleared(o, rows)
    assert (left @ s.T).abs().max() < 1e-12
    assert torch.allclose(equisteer.cleared(left, rows), left) and (rows.norm(dim=1) > 0.5).sum() == 2
    outside = left[0, 0]
    assert torch.allclose(equisteer.cleared(outside + 3 * s[0], rows), outside)


def test_equisteer_puts_back_the_allotted_groups_direction_at_its_size(model, fitted):
    mitigation = fitted("equisteer")
    name = next(iter(mitigation.directions))
    s, size = mitigation.directions[name][1], mitigation.sizes[name][1]
    mitigation._step = 1
    mitigation._open = torch.tensor([1, 1, 0])
    o = torch.randn(3, 4, s.shape[1], generator=torch.Generator().manual_seed(0))
    steered = mitigation.steer(name, o, o, torch.tensor([0, 1, 0]), torch.arange(3))
    perpendicular = equisteer.cleared(o, equisteer.basis(s))
    for row in (0, 1):
        back = mitigation.strength * size[row] * s[row]
        expected = unit(perpendicular[row] + back) * o[row].norm(dim=-1, keepdim=True)
        assert torch.allclose(steered[row], expected, atol=1e-5)
    assert torch.equal(steered[2], o[2])


def test_the_gate_is_where_group_prompts_stand_out():
    neutral = {"a": torch.tensor([[1.0, 5.0], [2.0, 5.0]]), "b": torch.tensor([[0.0, 1.0], [1.0, 2.0]])}
    female = {"a": torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "b": torch.tensor([[3.0, 0.0], [5.0, 0.0]])}
    male = {"a": torch.tensor([[0.0, 5.0], [0.0, 5.0]]), "b": torch.tensor([[0.0, 4.0], [0.0, 6.0]])}
    name, thresholds = equisteer.chosen_gate(neutral, [female, male])
    assert name == "b" and thresholds.tolist() == [(4 + 0.5) / 2, (5 + 1.5) / 2]


def test_logistic_regression_is_where_its_gradient_vanishes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator).double()
    y = x[:, 0] + 0.5 * torch.randn(40, generator=generator) > 0.2
    theta, bias = icm.logistic_regression(x, y, penalty=0.7)
    p = torch.sigmoid(x @ theta + bias)
    assert torch.allclose(x.T @ (p - y.double()) + 0.7 * theta, torch.zeros(3).double(), atol=1e-5)
    assert abs((p - y.double()).sum()) < 1e-5 and theta[0] > theta[1:].abs().max()


def test_two_groups_probes_point_opposite_ways_and_are_judged_on_what_they_have_not_seen():
    z = torch.tensor([[1.0, 0.2], [2.0, 0.1], [-1.0, 0.3], [-2.0, 0.2], [-3.0, 0.0]])
    y, held_out = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([False, False, False, False, True])
    theta, right = icm.probes(z, y, held_out, 2, 1.0)
    assert torch.allclose(theta[0], -theta[1], atol=1e-5) and theta[0, 0] > 0.9
    assert right == 0.0  # the one held out lies on the wrong side
    assert icm.probes(z[:4], y[:4], torch.zeros(4, dtype=torch.bool), 2, 1.0)[1] == 1.0


def test_icm_moves_outputs_along_the_probe_and_leaves_the_start(fitted):
    mitigation = fitted("icm")
    name = next(iter(mitigation.theta))
    o = torch.randn(2, 4, mitigation.theta[name].shape[-1], generator=torch.Generator().manual_seed(0))
    groups, kept = torch.tensor([1, 0]), mitigation.start
    mitigation.start, mitigation._step = 0.5, 1
    assert torch.equal(mitigation.steer(name, o, o, groups, torch.arange(2)), o)
    mitigation._step = 2
    moved, theta = mitigation.steer(name, o, o, groups, torch.arange(2)), mitigation.theta[name][2][groups]
    mitigation.start = kept
    expected = o + (mitigation.strength * mitigation.lengths[name][2] * theta)[:, None]
    assert torch.allclose(moved, unit(expected) * o.norm(dim=-1, keepdim=True), atol=1e-5)


# Errors


def test_names_seeds_and_samples_that_do_not_serve(model, samples, calibration):
    with pytest.raises(InputError, match="'ours' is not known; choose from prompt, conceptprune"):
        check_names(["ours"])
    with pytest.raises(InputError, match="'uce' is given twice"):
        check_names(["uce", "icm", "uce"])
    prompts = load_prompts("portraits", 2)
    with pytest.raises(InputError, match="seed 5000 is judged"):
        calibration_samples(prompts, 4999, 2, range(5000, 5010))
    with pytest.raises(InputError, match="0 calibration seeds"):
        calibration_samples(prompts, 0, 0, range(5))
    with pytest.raises(InputError, match="no calibration samples"):
        baseline_class("equisteer").fit(model, AXIS, [], calibration)
    with pytest.raises(InputError, match="needs labels of the model's own images"):
        baseline_class("icm").fit(model, AXIS, samples, replace(calibration, reader=None))
    with pytest.raises(InputError, match=r"1 of 1 calibration images show 'female'; a probe needs at least 2"):
        baseline_class("icm").fit(model, AXIS, samples[:1], calibration)
    with pytest.raises(InputError, match="shares add up to"):
        baseline_class("prompt").fit(model, AXIS, samples, replace(calibration, shares={"female": 0.9, "male": 0.3}))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Calibration(0, 1.0),
        lambda: concept_prune.PruneSettings(fraction=0.0),
        lambda: concept_prune.PruneSettings(strength=1.5),
        lambda: uce.EditSettings(rounds=0),
        lambda: h_space.DirectionSettings(rate=0),
        lambda: h_space.DirectionSettings(strength=-1),
        lambda: equisteer.SteerSettings(strength=float("nan")),
        lambda: icm.ProbeSettings(start=1.0),
    ],
)
def test_settings_out_of_range_are_refused_where_they_are_made(wrong):
    with pytest.raises(InputError):
        wrong()


def test_names_are_known_without_torch():
    code = "import sys, stereoclinic.evaluation.methods as b; assert b.BASELINES and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
