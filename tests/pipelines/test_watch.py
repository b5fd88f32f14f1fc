"""A watched call: the pipeline's own where it is left alone, what a visitor says where it is not; no trace is left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pipelines.tiny import build
from tests.pipelines.tiny_table import SMALL
from torch import Tensor, nn

from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.images import draw
from stereoclinic.pipelines.intercept import pass_of
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.watch import Visit, Walk, encode_groups
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import Row, generator, load_prompts, with_seeds

AXIS = load_axis("gender")
ROWS = list(with_seeds(load_prompts("portraits", 3), 0, 1))


@pytest.fixture(scope="module")
def portraits() -> Model:
    return open_model("portraits")


@pytest.fixture(scope="module")
def sd1() -> Model:
    return Model(build("sd1"), call=SMALL)


@pytest.fixture(scope="module")
def klein() -> Model:
    """Its denoiser is called twice a step, with the prompts and without."""
    return Model(build("flux2-klein"), call=SMALL)


@pytest.fixture(params=["sd1", "klein"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def bare(model: Model, steps: int, guidance: float, rows: list[Row] = ROWS) -> Tensor:
    """The latents of the pipeline's own call."""
    found: Tensor = model.pipe(
        prompt=[row["prompt"] for row in rows],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[generator(row, "noise") for row in rows],
        output_type="latent",
        **model.call,
    ).images
    return found


def watched(model: Model, steps: int, guidance: float, visit: Visit | None = None, **options: Any) -> Tensor:
    """The latents of a watched call."""
    found: Tensor = Walk(model, ROWS, steps, guidance, visit=visit, **options).run("latent").images
    return found


def look(call: Call) -> None:
    """Makes passes of its own, and changes nothing."""
    call.predict()
    call.predict(part=[1])


# --- left alone


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("visit", [None, look], ids=["nobody", "a visitor"])
def test_portraits_watched_and_left_alone_are_the_pipeline_s_own(
    portraits: Model, guidance: float, visit: Visit | None
) -> None:
    assert torch.equal(watched(portraits, 3, guidance, visit), bare(portraits, 3, guidance))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_others_watched_and_left_alone_are_the_pipeline_s_own(model: Model, guidance: float) -> None:
    plain = bare(model, 2, guidance)
    assert torch.equal(watched(model, 2, guidance, look), plain)
    assert torch.equal(bare(model, 2, guidance), plain)
    assert not torch.equal(bare(model, 2, 1.0 if guidance > 1 else 3.0), plain)


def test_pictures_are_those_that_the_pipeline_draws(sd1: Model) -> None:
    drawn = draw(sd1, ROWS, 2, 3.0)
    generators = [generator(row, "noise") for row in ROWS]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generators, "output_type": "np", **SMALL}
    plain = sd1.pipe([row["prompt"] for row in ROWS], **options).images
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn, torch.from_numpy((plain * 255).round().astype("uint8")).permute(0, 3, 1, 2))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_belongs_to_its_prompt_and_seed_not_to_its_batch(model: Model, guidance: float) -> None:
    rows = list(with_seeds(load_prompts("portraits", 2), 0, 2))
    together = Walk(model, rows, 2, guidance).run("latent").images
    for i in (0, 3):
        alone = Walk(model, [rows[i]], 2, guidance).run("latent").images
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)
    assert not torch.equal(together[0], together[2])  # same prompt, other seed


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("most", [1, 2])
def test_a_call_in_portions_is_the_whole_to_rounding(model: Model, guidance: float, most: int) -> None:
    sizes: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda network, _: sizes.append(len(pass_of(network).samples)))
    with hook:
        parted = watched(model, 2, guidance, portions=AdaptiveBatch(most))
    assert max(sizes) <= most * (2 if guidance > 1 else 1)
    torch.testing.assert_close(parted, bare(model, 2, guidance), atol=1e-4, rtol=1e-4)


def test_a_call_that_runs_out_of_memory_is_parted_and_said_once(sd1: Model) -> None:
    said: list[str] = []

    def small(network: nn.Module, args: tuple[Any, ...]) -> None:
        if len(pass_of(network).samples) > 2:  # with and without prompt, of one picture
            raise torch.OutOfMemoryError("CUDA out of memory")

    plain = bare(sd1, 2, 3.0)
    with sd1.network.register_forward_pre_hook(small):
        found = watched(sd1, 2, 3.0, portions=AdaptiveBatch(warn=said.append))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert said == ["3 samples at a time do not fit in memory; going on with 1"]


# --- a visitor's passes


def test_passes_at_a_point_are_functions_of_conditions_and_samples(model: Model) -> None:
    """Of other prompts: what those prompts' own call gives at its first step, from the same noise."""
    found: dict[str, Tensor] = {}

    def visit(call: Call) -> None:
        found["own"], found["groups"] = call.own(), call.compare(groups)
        for k, conditions in enumerate(groups):
            torch.testing.assert_close(call.predict(conditions), found["groups"][k], atol=1e-5, rtol=1e-4)
        part = call.predict(groups[1], part=[2, 0])
        torch.testing.assert_close(part, found["groups"][1][[2, 0]], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(call.predict(), found["own"], atol=1e-5, rtol=1e-4)

    walk = Walk(model, ROWS, 2, 3.0, visit=visit, last=1)
    (groups,) = encode_groups(walk, ROWS, [AXIS])
    walk.run()
    for k, word in enumerate(AXIS.words):
        prompts = [f"a photo of a {word} {row['person']}" for row in ROWS]
        first: list[Tensor] = []
        Walk(model, ROWS, 2, 3.0, prompts, lambda call: first.append(call.own()), last=1).run()  # noqa: B023
        torch.testing.assert_close(first[0], found["groups"][k], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(first[0], found["own"], rtol=1e-3)


def test_what_a_pass_is_about_is_said_and_comparisons_are_not_treated(model: Model) -> None:
    said: list[tuple[Any, ...]] = []

    def hear(network: nn.Module, args: Any) -> None:
        now = pass_of(network)
        said.append((now.step, now.timestep, now.samples, now.conditional, now.treated, now.total))

    def visit(call: Call) -> None:
        said.clear()
        call.predict(part=slice(1, 3))
        call.compare(groups, [2])
        steps.append((call.step, call.timestep))

    steps: list[tuple[int, float]] = []
    walk = Walk(model, ROWS, 2, 1.0, visit=visit)
    (groups,) = encode_groups(walk, ROWS, [AXIS])
    with model.network.register_forward_pre_hook(hear):
        walk.run()
    now = steps[-1]
    assert said[:2] == [(*now, (1, 2), (True, True), True, 3), (*now, (2, 2), (True, True), False, 3)]
    assert said[2:] == [(*now, (0, 1, 2), (True,) * 3, True, 3)]  # the pipeline's own
    assert [step for step, _ in steps] == list(range(len(steps)))
    assert pass_of(model.network) is None


# --- a visitor's reply


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_reply_of_the_prediction_itself_changes_nothing_but_rounding(model: Model, guidance: float) -> None:
    def visit(call: Call) -> None:
        call.reply = call.predict()

    torch.testing.assert_close(watched(model, 2, guidance, visit), bare(model, 2, guidance), atol=1e-4, rtol=1e-4)


def test_a_reply_is_what_the_pipeline_guides_and_steps_with(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction without prompt u, the reply c: the scheduler gets u + s (c - u)."""
    given: list[Tensor] = []
    scheduler = model.pipe.scheduler
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda f, *rest, **more: given.append(f) or step(f, *rest, **more))
    expected: list[Tensor] = []

    def visit(call: Call) -> None:
        call.reply = 2 * call.own() + 1
        without = call.run(call.without_prompt(), slice(None), True, conditional=False)
        expected.append(without + 3.0 * (call.reply - without))

    walk = Walk(model, ROWS, 2, 3.0, visit=visit)
    encode_groups(walk, ROWS, [AXIS])  # what is told without prompt is learnt on the way
    given.clear()
    walk.run()
    assert len(given) == len(expected) >= 2
    for one, two in zip(given, expected, strict=True):
        torch.testing.assert_close(one.flatten(1), two, atol=1e-4, rtol=1e-4)


def test_what_the_visitor_made_without_prompt_is_not_made_again(sd1: Model) -> None:
    sizes: list[int] = []

    def visit(call: Call) -> None:
        both = call.both()
        call.unguided, call.reply = both.chunk(2)

    hook = sd1.network.register_forward_pre_hook(lambda network, _: sizes.append(len(pass_of(network).samples)))
    walk = Walk(sd1, ROWS, 2, 3.0, visit=visit)
    with hook:
        found = walk.run("latent").images
    assert sizes == [6] * len(sizes) and len(sizes) == 3  # PNDM's three for two steps
    torch.testing.assert_close(found, bare(sd1, 2, 3.0), atol=1e-4, rtol=1e-4)


# --- and no trace


def state(model: Model) -> dict[str, Any]:
    """What a watched call touches."""
    network, scheduler = model.network, model.pipe.scheduler
    return {
        "class": type(network),
        "attributes": set(vars(network)),
        "forward": network.__dict__.get("forward"),
        "hooks": sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in network.modules()),
        "step": scheduler.__dict__.get("step"),
        "bar": dict(model.pipe._progress_bar_config),
    }


def interrupt(call: Call) -> None:
    if call.step == 1:
        raise KeyboardInterrupt


def fail(call: Call) -> None:
    raise ValueError("a visitor's own")


def broken(network: nn.Module, args: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("how", ["through", "left", "interrupted", "failed", "broken"])
def test_what_was_replaced_is_put_back_however_a_call_ends(model: Model, how: str) -> None:
    model.pipe.set_progress_bar_config(disable=True, desc="mine")
    before = state(model)
    if how == "through":
        watched(model, 2, 3.0, look)
    elif how == "left":
        done: list[int] = []
        assert Walk(model, ROWS, 3, 3.0, last=2, stepped=done.append).run() is None
        assert done == [1, 2]
    elif how == "broken":
        with model.network.register_forward_pre_hook(broken), pytest.raises(ZeroDivisionError):
            watched(model, 2, 3.0)
    else:
        visit: Callable[[Call], None] = interrupt if how == "interrupted" else fail
        with pytest.raises(KeyboardInterrupt if how == "interrupted" else ValueError):
            watched(model, 3, 3.0, visit)
    assert state(model) == before
    assert torch.equal(watched(model, 2, 3.0), bare(model, 2, 3.0))


def test_a_step_that_somebody_else_wrapped_stays_wrapped(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    own = sd1.pipe.scheduler.step

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        steps.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(sd1.pipe.scheduler, "step", wrapper)
    watched(sd1, 2, 1.0)
    assert len(steps) >= 3 and sd1.pipe.scheduler.step is wrapper


def test_a_walk_can_be_made_again(model: Model) -> None:
    asked: list[int] = []
    walk = Walk(model, ROWS, 2, 3.0, visit=lambda call: asked.append(call.step))
    one, two = walk.run("latent").images, walk.run("latent").images
    assert torch.equal(one, two) and asked[: len(asked) // 2] == asked[len(asked) // 2 :] and 1 in asked


# --- what cannot be


def test_a_call_that_is_watched_is_not_watched_again_from_within(sd1: Model) -> None:
    def nested(call: Call) -> None:
        Walk(sd1, ROWS, 2, 1.0).run()

    with pytest.raises(RuntimeError, match="before the walk, not in its visitor"):
        watched(sd1, 2, 1.0, nested)
    assert torch.equal(watched(sd1, 2, 1.0), bare(sd1, 2, 1.0))


def test_predictions_end_with_their_call(sd1: Model) -> None:
    calls: list[Call] = []
    kind = type(sd1.network)
    watched(sd1, 2, 1.0, calls.append)
    with pytest.raises(RuntimeError, match="has ended"):
        calls[0].predict()
    assert type(sd1.network) is kind
