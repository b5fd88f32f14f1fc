"""Each baseline does what the formula of its paper says."""

import math
from dataclasses import replace

import numpy as np
import torch
from tests.evaluation.methods.conftest import AXIS, GROUPED, NEUTRAL, STEPS, Alternating, draw, untreated
from torch import Tensor
from torch.nn import functional

from stereoclinic.evaluation.methods import (
    concept_prune,
    equisteer,
    h_space,
    icm,
    uce,
)
from stereoclinic.evaluation.methods.baseline import attention_blocks, nearest, unit
from stereoclinic.evaluation.methods.calibration import Run
from stereoclinic.pipelines.conditions import encode
from stereoclinic.pipelines.watch import Walk


def test_the_nearest_calibrated_timestep():
    assert nearest(torch.tensor([900.0, 500.0, 100.0]), 620) == 1


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
