"""What is learnt by comparing calls: rows, conditions, who sees the prompt, timesteps; and what cannot be learnt."""

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_parts import CLIP_WIDTH, t5, unet
from tests.pipelines.tiny_table import SMALL
from tests.pipelines.tiny_unets import stable_diffusion
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.pipelines.conditions import encode
from stereoclinic.pipelines.learn import Learnt, learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import Schedule, schedule_of


def model_of(name: str) -> Model:
    return Model(build(name), name, call=dict(TINY[name].call))


@pytest.fixture(scope="module")
def sd1() -> Model:
    return model_of("sd1")


@pytest.mark.parametrize(
    ("name", "guided", "alone"),
    [
        ("sd1", [(False, True)], [(True,)]),
        ("sdxl", [(False, True)], [(True,)]),
        ("pixart-sigma", [(False, True)], [(True,)]),
        ("flux", [(True,)], [(True,)]),  # told the scale, which it was distilled for
        ("lcm", [(True,)], [(True,)]),
        ("flux2-klein", [(True,), (False,)], [(True,)]),
        ("lumina2", [(True,), (False,)], [(True,)]),
        ("z-image", [(True, False)], [(True, False)]),  # guides from 0 on
    ],
)
def test_rows_that_see_the_prompt_are_told(name: str, guided: list, alone: list) -> None:
    model = model_of(name)
    assert [call.blocks for call in learnt_of(model, 3.0).calls] == guided
    assert [call.blocks for call in learnt_of(model, 1.0).calls] == alone
    learnt = learnt_of(model, 3.0)
    assert learnt.guides == any(False in blocks for blocks in guided)
    assert learnt.apart == (len(guided) == 2)


@pytest.mark.parametrize(
    ("name", "conditions", "rows"),
    [
        ("sd1", {"encoder_hidden_states"}, {"sample"}),
        ("sdxl", {"encoder_hidden_states", "added_cond_kwargs.text_embeds"}, {"sample", "added_cond_kwargs.time_ids"}),
        ("lcm", {"encoder_hidden_states"}, {"sample", "timestep_cond"}),
        ("sd3", {"encoder_hidden_states", "pooled_projections"}, {"hidden_states", "timestep"}),
        ("flux", {"encoder_hidden_states", "pooled_projections"}, {"hidden_states", "timestep", "guidance"}),
        ("z-image", {"cap_feats"}, {"x", "t"}),  # lists of one entry a row
    ],
)
def test_conditions_and_rows_are_found_whatever_they_are_called(name: str, conditions: set, rows: set) -> None:
    learnt = learnt_of(model_of(name), 3.0)
    assert {".".join(map(str, path)) for path in learnt.conditions} == conditions
    assert {".".join(map(str, path)) for path in learnt.axes} == conditions | rows
    assert learnt.telling in learnt.conditions


@pytest.mark.parametrize(
    ("name", "sign", "kept"), [("sd1", 1, 1.0), ("pixart-sigma", 1, 0.5), ("lumina2", -1, 1.0), ("z-image", -1, 1.0)]
)
def test_what_the_scheduler_is_given_of_an_output_is_told(name: str, sign: int, kept: float) -> None:
    """PixArt predicts a variance too; Lumina 2 and Z-Image step with the negated output."""
    learnt = learnt_of(model_of(name), 3.0)
    output = learnt.calls[0].output
    flat = learnt.flat(output)
    whole = output[0] if not isinstance(output[0], list) else torch.stack(output[0])
    assert learnt.sign == sign
    assert flat.shape == (len(whole), kept * whole[0].numel())
    twice = learnt.put(output, 2 * flat)
    torch.testing.assert_close(learnt.flat(twice), 2 * flat)
    torch.testing.assert_close(learnt.flat(learnt.put(twice, flat)), flat)
    assert learnt.flat(learnt.stub(0, {learnt.latents: whole})).shape[1] == flat.shape[1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_is_learnt_once_and_anew_where_it_is_another(guidance: float, monkeypatch: Any) -> None:
    model, calls = model_of("sd1"), 0
    call = type(model.pipe).__call__

    @wraps(call)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(*args, **kwargs)

    monkeypatch.setattr(type(model.pipe), "__call__", counted)

    def learns(other: Model) -> bool:
        nonlocal calls
        calls = 0
        learnt_of(other, guidance)
        schedule_of(other, 3, guidance)
        return calls > 0

    assert learns(model) and not learns(model)
    assert not learns(Model(model.pipe, call=SMALL))  # another model of the same pipeline and options
    assert learns(Model(model.pipe, call={**SMALL, "height": 32}))
    model.pipe.scheduler = EulerDiscreteScheduler.from_config(model.pipe.scheduler.config)
    assert learns(model) and not learns(model)
    model.pipe.scheduler.register_to_config(timestep_spacing="trailing")
    assert learns(model)
    model.replace(unet(CLIP_WIDTH))
    assert learns(model)


def test_learning_draws_nothing_from_the_global_generator(sd1: Model) -> None:
    other = Model(copy(sd1.pipe), call=SMALL)
    state = torch.random.get_rng_state()
    learnt_of(other, 2.0)
    schedule_of(other, 5, 2.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_conditions_of_prompts_are_those_of_each_prompt_in_its_order(sd1: Model) -> None:
    prompts = ["a photo of a doctor", "a photo of an old female nurse", "a photo of a doctor"]
    own, none = encode(sd1, prompts, 3.0)
    assert {len(rows) for each in (own, none) for rows in each.rows.values()} == {3}
    assert own.differ(0, 1) and not own.differ(0, 2) and not none.differ(0, 1)
    states, negative = sd1.pipe.encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(own.rows[("encoder_hidden_states",)], states)
    torch.testing.assert_close(none.rows[("encoder_hidden_states",)], negative)
    alone, nothing = encode(sd1, prompts[:1], 1.0)
    torch.testing.assert_close(alone.rows[("encoder_hidden_states",)], states[:1])
    assert nothing is None


# --- timesteps


@pytest.mark.parametrize(
    ("name", "steps", "told"),
    [
        ("sd1", 4, lambda t: t),
        ("flux", 4, lambda t: t / 1000),
        ("lumina2", 4, lambda t: 1 - t / 1000),
        ("z-image", 4, lambda t: (1000 - t) / 1000),
    ],
)
def test_timesteps_are_the_scheduler_s_whatever_the_denoiser_is_told(name: str, steps: int, told: Callable) -> None:
    model, ran = model_of(name), []
    learnt_of(model, 1.0)
    with model.network.register_forward_pre_hook(lambda *_: ran.append(1)):
        schedule = schedule_of(model, steps, 1.0)
    assert not ran  # the denoiser is not needed for it
    assert schedule.timesteps == tuple(model.pipe.scheduler.timesteps.tolist())
    for timestep, value in zip(schedule.timesteps, schedule.told, strict=True):
        assert value == pytest.approx(told(timestep), abs=1e-6)
        assert schedule.timestep(value) == pytest.approx(timestep, abs=1e-3)


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=8, unique=True),
    st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3),
    st.floats(-5, 5),
    st.floats(-100, 1100),
)
def test_what_is_told_linearly_is_told_apart_everywhere(
    steps: list[int], scale: float, shift: float, between: float
) -> None:
    """Between the recorded steps, and beyond them: a mask is used at other numbers of steps."""
    timesteps = tuple(sorted(map(float, steps), reverse=True))
    schedule = Schedule(timesteps, tuple(scale * t + shift for t in timesteps))
    assert schedule.timestep(scale * between + shift) == pytest.approx(between, abs=1e-4)


def test_one_step_is_enough_to_tell_a_scale() -> None:
    assert Schedule((999.0,), (0.999,)).timestep(0.5) == pytest.approx(500)
    assert Schedule((999.0,), ()).timestep(0.5) == 0.5


# --- what cannot be learnt


def test_a_text_encoder_that_ignores_the_prompt_is_refused() -> None:
    pipe = build("sd1")
    pipe.text_encoder.register_forward_hook(
        lambda module, args, output: type(output)({name: torch.zeros_like(value) for name, value in output.items()})
    )
    with pytest.raises(InputError, match=r"no argument of its denoiser depends on the prompt.*text encoder"):
        learnt_of(Model(pipe, "deaf", call=SMALL), 3.0)


class Remembers:
    """Adds what it was asked before, as a cache between calls would."""

    def __init__(self) -> None:
        self.before: Tensor | float = 0.0

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        (sample,) = output
        added, self.before = sample + self.before, sample.mean()
        return (added,)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_denoiser_that_keeps_a_state_between_calls_is_refused(guidance: float) -> None:
    pipe = build("sd1")
    pipe.unet.register_forward_hook(Remembers())
    with pytest.raises(InputError, match="gives another prediction when it is called again with the same arguments"):
        learnt_of(Model(pipe, call=SMALL), guidance)


def test_a_denoiser_that_draws_is_refused() -> None:
    model = Model(build("sd1"), call=SMALL)
    model.network.register_forward_hook(lambda module, args, output: (output[0] + torch.randn_like(output[0]),))
    with pytest.raises(InputError, match=r"another prediction .*\(it keeps a state between calls, drops out"):
        learnt_of(model, 3.0)


def test_dropout_in_a_text_encoder_makes_no_noise() -> None:
    """A T5 encoder that is built from a configuration is in train mode."""
    pipe = build("pixart-sigma")
    pipe.text_encoder = t5()
    assert pipe.text_encoder.training and pipe.text_encoder.config.dropout_rate > 0
    model = Model(pipe, call=dict(TINY["pixart-sigma"].call))
    (one, _), (two, _) = (encode(model, ["a photo of a doctor"], 3.0) for _ in range(2))
    for path, leaf in one.rows.items():
        assert torch.equal(leaf, two.rows[path])


def test_a_pipeline_that_refuses_its_options_is_refused_in_its_words() -> None:
    model = Model(build("sd3"), call={"height": 13})
    with pytest.raises(InputError, match=r"StableDiffusion3Pipeline .*`height` and `width` have to be divisible"):
        learnt_of(model, 3.0)


def test_what_a_visitor_or_the_denoiser_raises_is_no_option_s_fault() -> None:
    model = Model(stable_diffusion(scheduler=DDIMScheduler()), call=SMALL)

    def broken(module: nn.Module, args: Any) -> None:
        raise ValueError("in the denoiser")

    with model.network.register_forward_pre_hook(broken), pytest.raises(ValueError, match=r"^in the denoiser$"):
        learnt_of(model, 3.0)


def test_packed_rows_are_refused() -> None:
    """Rows of two pictures in one: which is whose cannot be told."""
    learnt = learnt_of(model_of("sd1"), 3.0)
    packed = {"sample": torch.zeros(4, 4, 8, 8), "encoder_hidden_states": torch.zeros(3, 24, 16)}
    assert isinstance(learnt, Learnt)
    with pytest.raises(InputError, match="encoder_hidden_states packs what belongs to several images"):
        learnt.axes_of(packed)
    shared = {"sample": torch.zeros(4, 4, 8, 8), "encoder_hidden_states": torch.zeros(1, 24, 16)}
    assert learnt.axes_of(shared) == {("sample",): 0}


def other_embeddings(model: Model) -> None:
    """As textual inversion leaves them."""
    model.pipe.text_encoder.get_input_embeddings().weight.data.mul_(1.5)


def lora(model: Model) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


@pytest.mark.parametrize("change", [other_embeddings, lora])
def test_prompts_are_encoded_by_the_text_encoder_as_it_is_now(change: Callable[[Model], None]) -> None:
    used, fresh = model_of("sd1"), model_of("sd1")
    path = learnt_of(used, 3.0).telling
    before = encode(used, ["a photo of a nurse"], 3.0)[0].rows[path]
    change(used)
    change(fresh)
    now = encode(used, ["a photo of a nurse"], 3.0)[0].rows[path]
    assert not torch.allclose(now, before)
    assert torch.equal(now, encode(fresh, ["a photo of a nurse"], 3.0)[0].rows[path])
