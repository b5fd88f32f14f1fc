"""Any scheduler that is deterministic or can be seeded: walked by the pipeline, each sample by its own seed."""

from collections.abc import Callable
from copy import copy
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from tests.pipelines.tiny import build
from tests.pipelines.tiny_table import SMALL
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.clean import clean_latents, denoised
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import Row, generator

Make = Callable[..., Model]
ROWS: list[Row] = [{"prompt": "a photo of a doctor", "seed": 0}, {"prompt": "a photo of a nurse", "seed": 1}]

#: (class, over its configuration)
DETERMINISTIC = [
    ("DDIMScheduler", {}),
    ("DDIMParallelScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("TCDScheduler", {}),
    ("UniPCMultistepScheduler", {}),
]
STOCHASTIC = [
    ("DDPMScheduler", {}),
    ("DDPMParallelScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("SASolverScheduler", {}),
]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
#: Other measures of noise than that of DDPM.
OTHERS = [
    ("DPMSolverMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", FLOW),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
]
#: Nothing says what they predict.
UNTYPED = [("CMStochasticIterativeScheduler", {}), ("IPNDMScheduler", {})]
#: They do not say what they took for clean.
SILENT = ("DEISMultistepScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler")
named = pytest.mark.parametrize(("name", "config"), DETERMINISTIC + STOCHASTIC, ids=str)


pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # numpy's, on torch's tensors


@pytest.fixture(scope="module")
def pipes() -> dict[str, DiffusionPipeline]:
    """Built once: only their schedulers are exchanged."""
    return {}


@pytest.fixture
def made(pipes: dict[str, DiffusionPipeline]) -> Make:
    def make(name: str, config: dict, family: str = "sd1", **more: object) -> Model:
        if family not in pipes:
            pipes[family] = build(family)
        pipe = copy(pipes[family])
        # Clipping is for pictures; latents of any model leave [-1, 1].
        config = {"clip_sample": False, **config, **more}
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
        return Model(pipe, call=SMALL)

    return make


def latents(model: Model, rows: list[Row], guidance: float, **options: Any) -> Tensor:
    """What a watched call of four steps ends in."""
    found: Tensor = Walk(model, rows, 4, guidance, **options).run("latent").images
    return found


@pytest.mark.parametrize(("name", "config"), [*DETERMINISTIC, *STOCHASTIC, *OTHERS, *UNTYPED], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_watched_call_is_the_pipeline_s_own(made: Make, name: str, config: dict, guidance: float) -> None:
    """Bit for bit, and the denoiser is called at the timesteps that are said, as are those of a step's second order."""
    model = made(name, config)
    walked: list[float] = []
    found = latents(model, ROWS, guidance, visit=lambda call: walked.append(call.timestep))
    plain = model.pipe(
        [row["prompt"] for row in ROWS],
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=[generator(row, "noise") for row in ROWS],
        output_type="latent",
        **SMALL,
    ).images
    # On the same scheduler: what the first run left in it must not reach the second.
    assert torch.equal(found, plain)
    schedule = schedule_of(model, 4, guidance)
    assert tuple(walked) == schedule.timesteps == tuple(model.pipe.scheduler.timesteps.tolist())
    # To rounding: the two calls of a second-order step may differ in the last bit, upwards too, by machine.
    assert all(after <= before + 1e-3 for before, after in pairwise(walked)) and len(walked) >= 4


@pytest.mark.parametrize(("name", "config"), STOCHASTIC, ids=str)
def test_a_picture_depends_on_its_own_row_alone(made: Make, name: str, config: dict) -> None:
    model = made(name, config)
    torch.manual_seed(1)
    together = latents(model, ROWS, 1.0)
    torch.manual_seed(2)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(latents(model, [row], 1.0)[0], together[i], atol=1e-4, rtol=1e-4)
    other = latents(model, [{**ROWS[0], "seed": 9}], 1.0)
    assert not torch.allclose(other[0], together[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@named
def test_clean_latents_undo_the_schedulers_noise(made: Make, name: str, config: dict, kind: str) -> None:
    """Noise is added by the scheduler itself; a perfect prediction takes it away again, at every timestep."""
    scheduler: Any = made(name, config, prediction_type=kind).pipe.scheduler
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = 4
    scheduler.set_timesteps(steps)
    for i in range(len(scheduler.timesteps)):
        scheduler.set_timesteps(steps)
        timestep = scheduler.timesteps[i]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
        seen = scheduler.scale_model_input(scheduler.add_noise(clean, noise, timestep[None]), timestep)
        prediction = {"epsilon": noise, "sample": clean}.get(kind)
        if prediction is None:  # v = alpha e - sigma x, where the model's input is alpha x + sigma e
            both = torch.stack([clean, noise]).double().flatten(1).T
            alpha, sigma = (float(x) for x in torch.linalg.lstsq(both, seen.double().flatten()[:, None]).solution)
            assert abs(alpha**2 + sigma**2 - 1) < 1e-4
            prediction = alpha * noise - sigma * clean
        found = denoised(scheduler, prediction, timestep, seen)
        # Near pure noise alpha is 0.07, and rounding is divided by it.
        torch.testing.assert_close(found, clean, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("name", "config"), [each for each in DETERMINISTIC + STOCHASTIC + OTHERS if each[0] not in SILENT], ids=str
)
def test_clean_latents_are_those_the_step_uses(made: Make, name: str, config: dict, family: str) -> None:
    """Along a walk of an epsilon and of a v model, and asking for them does not move the scheduler on."""
    model = made(name, config, family)
    scheduler: Any = model.pipe.scheduler
    used: list[Tensor] = []
    found: list[Tensor] = []
    step = scheduler.step
    if hasattr(scheduler, "convert_model_output"):  # the solvers of x_0 turn every prediction into it here
        convert = scheduler.convert_model_output
        scheduler.convert_model_output = lambda *args, **kwargs: used.append(convert(*args, **kwargs)) or used[-1]
    else:

        def stepped(*args: Any, return_dict: bool = True, **kwargs: Any) -> tuple[Tensor]:
            outcome = step(*args, **kwargs)
            used.append(outcome.pred_original_sample)
            return (outcome.prev_sample,)

        scheduler.step = stepped

    def visit(call: Call) -> None:
        prediction = call.own()
        found.append(clean_latents(model, call, prediction))
        torch.testing.assert_close(clean_latents(model, call, prediction), found[-1])

    walk = Walk(model, ROWS, 4, 1.0, visit=visit)
    used.clear()
    walk.run()
    assert len(found) == len(used) >= 4
    for one, two in zip(found, used, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_clean_latents_are_differentiable_in_the_prediction(made: Make) -> None:
    """d clean / d epsilon = -sigma / alpha, the same everywhere."""
    scheduler: Any = made("DDIMScheduler", {}).pipe.scheduler
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[1]
    prediction = torch.zeros(2, 4, 8, 8, requires_grad=True)
    clean = denoised(scheduler, prediction, timestep, torch.randn(2, 4, 8, 8))
    (grad,) = torch.autograd.grad(clean.sum(), prediction)
    share = scheduler.alphas_cumprod[timestep]
    torch.testing.assert_close(grad, (-(((1 - share) / share) ** 0.5)).expand_as(grad))


def test_a_scheduler_that_does_not_say_how_noisy_it_is_has_no_clean_latents(made: Make) -> None:
    model = made("CMStochasticIterativeScheduler", {})
    walk = Walk(model, ROWS, 2, 1.0, visit=lambda call: clean_latents(model, call, call.own()))
    with pytest.raises(InputError, match="CMStochasticIterativeScheduler has prediction type None"):
        walk.run()


class SelfSeeded(EulerDiscreteScheduler):
    """Draws its noise from a process of its own, as DPMSolverSDEScheduler does from torchsde."""

    def step(self, model_output, timestep, sample, return_dict=True, s_noise=1.0):  # type: ignore[no-untyped-def]
        raise NotImplementedError


class NeedsMore(DDIMScheduler):
    """A step that needs a picture and a mask, as RePaintScheduler's does."""

    def step(self, model_output, timestep, sample, original_image, mask, generator=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (SelfSeeded, "SelfSeeded adds noise that cannot be seeded sample by sample"),
        (NeedsMore, "a step of its NeedsMore needs original_image, mask"),
        (diffusers.RePaintScheduler, "a step of its RePaintScheduler needs original_image, mask"),
        (diffusers.ScoreSdeVeScheduler, "its ScoreSdeVeScheduler has no step"),
    ],
)
def test_schedulers_that_cannot_be_walked_are_refused(made: Make, kind: type, says: str) -> None:
    model = made("DDIMScheduler", {})
    model.pipe.scheduler = kind()
    with pytest.raises(InputError, match=says):
        learnt_of(model, 1.0)


def test_an_inverse_scheduler_is_refused(made: Make) -> None:
    with pytest.raises(InputError, match="DDIMInverseScheduler walks from an image to noise; use the scheduler that"):
        schedule_of(made("DDIMInverseScheduler", {}), 4, 1.0)


def test_steps_that_a_scheduler_cannot_make(made: Make) -> None:
    with pytest.raises(InputError, match=r"StableDiffusionPipeline refuses its call \(99 steps\): .*: 99\. "):
        schedule_of(made("LCMScheduler", {}), 99, 1.0)
