"""The laws that every pipeline class keeps, on tiny random pipelines of each; see `tiny`."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.pipelines.table import PAGE, opened, scale
from tests.pipelines.table import row as table_row
from tests.pipelines.tiny import REFUSED, TINY, build
from torch import Tensor, nn

from stereoclinic.ddtd.conservation import check
from stereoclinic.ddtd.lean import get_target, group_directions, lean
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules.operations import tensors
from stereoclinic.ddtd.step import StepSettings, measure
from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.hooks import Hooks
from stereoclinic.pipelines.images import as_tensor
from stereoclinic.pipelines.intercept import pass_of
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import Site, find_sites, spans
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import Row, generator, load_prompts, with_seeds
from stereoclinic.sns.adapter import load_mask, unload_mask
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

AXIS = load_axis("gender")
#: Two samples whose prompts have as many words: a few pipelines pad without a mask, so company of other lengths counts.
ROWS = list(with_seeds(load_prompts("portraits", 2), first=0, count=1))
#: What a denoiser does that makes it no function of its arguments.
NOT_SUPPORTED = {"sd-pag": "on the rows that see the prompt alone"}
#: Operations that epsilon-cp does not know: they are refused by name, and the gradient is there.
UNCOVERED = {"nucleus-moe": {"torch.Tensor.clamp", "torch.Tensor.scatter_add"}}
#: How far the relevance of a site may lie from a finite difference, in units of the largest; single precision.
TOLERANCE = 0.05
#: Experts are chosen for each token, and where a choice jumps there is no derivative: the median is looked at.
ROUTED = {"hidream", "nucleus-moe"}


@pytest.fixture(params=[name for name in TINY if name not in NOT_SUPPORTED], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    """Each pipeline in turn; the laws of one are tested together, so that it is built once."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def model(name: str) -> Model:
    return opened(name)


#: Pipelines that give pictures alone, and no latents.
PICTURES = {"if", "ldm"}


def called(name: str, model: Model) -> Tensor:
    """What the pipeline's own call gives for ROWS."""
    return tensor(
        model.pipe(
            prompt=[row["prompt"] for row in ROWS],
            generator=[generator(row, "noise") for row in ROWS],
            num_inference_steps=TINY[name].steps,
            output_type="pil" if name in PICTURES else "latent",
            **model.options(scale(name, model)),
        )
    )


def watched(name: str, model: Model, rows: Sequence[Row] = ROWS) -> Tensor:
    """What a watched call gives that is left alone."""
    walk = Walk(model, rows, TINY[name].steps, scale(name, model))
    return tensor(walk.run("pil" if name in PICTURES else "latent"))


def tensor(output: Any) -> Tensor:
    """Latents, or pictures, rows first."""
    first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    if isinstance(first, Tensor):
        return first.float()
    return (torch.stack(first) if isinstance(first[0], Tensor) else as_tensor(output)).float()


def silencing(model: Model, branch: str = "both", groups: tuple[str, ...] = ()) -> NeuronMask:
    """Damps every neuron by nine tenths; with two groups, the second one's images not at all."""
    sites = find_sites(model.network)
    width = sum(site.width for site in sites)
    factors = torch.full((1, width), 0.1)
    if groups:
        factors = torch.stack([factors, torch.ones_like(factors)])
    return NeuronMask(sites, torch.tensor([1e6, -1e6]), factors, branch=branch, groups=groups)


def test_a_call_that_is_watched_and_left_alone_gives_the_pipelines_own_pictures(name: str, model: Model) -> None:
    kind = type(model.network)
    assert torch.equal(watched(name, model), called(name, model))
    assert type(model.network) is kind and "step" not in vars(model.pipe.scheduler)


def test_a_picture_does_not_depend_on_its_batch(name: str, model: Model) -> None:
    together = watched(name, model)
    alone = torch.cat([watched(name, model, [row]) for row in ROWS])
    rounding = 1.0 if name in PICTURES else 1e-3 * (together[0] - together[1]).abs().max()
    assert (together - alone).abs().max() <= rounding < (together[0] - together[1]).abs().max()


def test_the_rows_that_see_the_prompt_are_the_conditional_ones(name: str, model: Model) -> None:
    """What other prompts change in them is what the walk's own prediction changes by; the others do not move."""
    steps, guidance = TINY[name].steps, scale(name, model)
    learnt = learnt_of(model, guidance)
    seen: dict[int, list[Tensor]] = {}
    for prompts in ([row["prompt"] for row in ROWS], ["a photo of a nurse", ROWS[1]["prompt"]]):

        def visit(call: Call, kept: list[Tensor]) -> None:
            if call.step == 0:
                kept.append(call.own())

        kept: list[Tensor] = []
        walk = Walk(model, ROWS, steps, guidance, prompts, last=1)
        walk.visit = lambda call, kept=kept: visit(call, kept)
        walk.run()
        seen[len(seen)] = kept
    first, second = seen[0][0], seen[1][0]
    assert any(any(call.blocks) for call in learnt.calls)
    assert (first[0] - second[0]).abs().max() > 100 * (first[1] - second[1]).abs().max()


def test_a_mask_comes_off_without_a_trace(name: str, model: Model) -> None:
    before = called(name, model)
    load_mask(model, silencing(model))
    damped = called(name, model)
    unload_mask(model)
    assert not torch.equal(damped, before)
    assert torch.equal(called(name, model), before)


def test_groups_that_are_allotted_reach_their_images(name: str, model: Model) -> None:
    """Of two images one is damped, watched or not; the other one is drawn as it was."""
    before, mask = called(name, model), silencing(model, "conditional", ("female", "male"))
    for drawn in (called, watched):
        for allotted in (["female", "male"], ["male", "female"]):
            with suppress(model, mask) as suppression:
                suppression.allot(allotted)
                moved = (drawn(name, model) - before).abs().flatten(1).mean(1)
            hit = allotted.index("female")
            assert moved[hit] > 0 and moved[hit] > 20 * moved[1 - hit]


def test_gradient_relevance_of_a_site_is_what_damping_it_does(name: str, model: Model) -> None:
    """sum_j a_j dS/da_j over a random half of a site's neurons, against a central difference of the lean.

    Not over all of them: where a norm follows a site, damping all alike changes nothing.
    """
    guidance, sites = scale(name, model), find_sites(model.network)
    epsilon = 1e-3 if name in ROUTED else 0.01
    how = StepSettings(propagate("gradient", model.network), False, get_target("lean"), off_axis=0.0)
    pairs: list[tuple[Tensor, Tensor]] = []

    def visit(call: Call) -> None:
        if pairs:
            return
        *_, measured = measure(model, call, groups, sites, ROWS, how)
        balanced, directions = group_directions(call.compare(groups))

        def toward(site: Site, factor: Tensor) -> Tensor:
            def act(_: str, x: Tensor) -> Tensor:
                x = x.clone()
                site.of(x).mul_(factor.view(-1, *[1] * (x.ndim - 2)) if site.dim == 1 else factor)
                return x

            with Hooks(model.network, [site.layer], act):
                return lean(call.predict(), balanced, directions)[0]

        with torch.no_grad():
            for site, span in spans(sites):
                half = (torch.rand(site.width, generator=torch.Generator().manual_seed(span.start)) < 0.5).float()
                up, down = (toward(site, 1 + sign * epsilon * half) for sign in (1, -1))
                pairs.append(((up - down) / (2 * epsilon), (measured.relevance[0, :, span] * half).sum(1)))

    walk = Walk(model, ROWS, TINY[name].steps, guidance, visit=visit, last=1)
    (groups,) = encode_groups(walk, ROWS, [AXIS])
    walk.run()
    wanted, found = (torch.stack(each) for each in zip(*pairs, strict=True))
    assert wanted.abs().max() > 0
    error = (wanted - found).abs() / wanted.abs().amax(0)  # (sites, B)
    assert (error.median() if name in ROUTED else error.max()).item() < TOLERANCE


def test_the_documentation_says_what_was_seen(name: str, model: Model) -> None:
    """`python -m tests.pipelines.table` writes the rows."""
    assert table_row(name, model) in PAGE.read_text().splitlines()


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_a_denoiser_that_is_no_function_of_its_rows_is_refused(name: str) -> None:
    model = opened(name)
    with pytest.raises(InputError, match=NOT_SUPPORTED[name]):
        learnt_of(model, scale(name, model))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_to_image_pipeline_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as error:
        model = Model(REFUSED[name].make(), name)
        learnt_of(model, model.defaults.guidance)
    assert "\n" not in str(error.value) and type(REFUSED[name].make()).__name__ in str(error.value)


def test_relevance_adds_up_at_every_block_boundary(name: str, model: Model) -> None:
    """Of epsilon-cp, with all biases at zero, so that nothing but what is itemised takes any."""
    kept: list[dict[str, Any]] = []
    walk = Walk(model, ROWS, TINY[name].steps, scale(name, model), last=1)
    walk.visit = lambda call: kept.append(call.arguments(None, slice(None)))
    walk.run()
    text = [leaf for path, leaf in tree.leaves(kept[0], walk.learnt.axes) if path in walk.learnt.conditions]
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for part, parameter in network.named_parameters():
            if part.endswith("bias"):
                parameter.zero_()
    found = check(network, lambda: walk.learnt.flat(network(**kept[0])), "epsilon-cp", text=list(tensors(text)))
    assert found.uncovered.keys() == UNCOVERED.get(name, set()) and found.fault is None
    assert len(found.cuts) > 1 and (found.uncovered or found.error < 1e-4)


@pytest.mark.parametrize(
    ("name", "option"), [("z-image", {"cfg_truncation": 0.2}), ("lumina2", {"cfg_trunc_ratio": 0.5})]
)
def test_guidance_that_ends_midway_is_followed(name: str, option: dict[str, float]) -> None:
    """From there on the denoiser is called without the rows that see no prompt."""
    model, steps = Model(build(name), name, call={**TINY[name].call, **option}), 4
    passes: list[tuple[int, bool]] = []  # step, and whether the row sees the prompt

    def note(network: nn.Module, *_: Any) -> None:
        now = pass_of(network)
        if now is not None:
            passes.extend((now.step, conditional) for conditional in now.conditional)

    handle = model.network.register_forward_pre_hook(note)
    Walk(model, ROWS, steps, scale(name, model)).run()
    handle.remove()
    assert {step for step, conditional in passes if conditional} == set(range(steps))
    without = {step for step, conditional in passes if not conditional}
    assert without and without < set(range(steps))
