"""A text-to-image pipeline as the toolkit uses it: its denoiser, the options of its call, and what is refused."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.io.metadata import Form, parse
from stereoclinic.io.reading import read_json
from stereoclinic.pipelines.arguments import inner

#: Arguments of a pipeline's call that the toolkit sets itself, or that would change the kind of output.
RESERVED = frozenset(
    [
        "self", "args", "kwargs", "prompt", "generator", "num_inference_steps", "guidance_scale",
        "num_images_per_prompt", "images_per_prompt", "latents", "output_type", "return_dict",
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "timesteps", "sigmas",
        "callback_on_step_end", "callback", "callback_steps", "image", "images", "input_images",
    ]
)  # fmt: skip
#: Parameters of a pipeline's call that show it is made for another task, and the message for such a pipeline.
_OTHER_TASKS = {
    "num_frames": "it makes videos",
    "video_length": "it makes videos",
    "audio_length_in_s": "it makes sound",
    "audio_end_in_s": "it makes sound",
    "mask_image": "it fills in parts of a given image; give the text-to-image model",
    "control_image": "a ControlNet steers it by images; give the model without it",
    "controlnet_conditioning_scale": "a ControlNet steers it by images; give the model without it",
    "strength": "it starts from a given image; give the text-to-image model",
    "image_embeds": "it draws from the output of another model (a prior); pipelines of two denoisers are not supported",
    "image_embeddings": "it draws from the output of another model (a prior); two denoisers are not supported",
    "prior_guidance_scale": "it has two denoisers, a prior and a decoder; one U-Net or one transformer is expected",
}


@dataclass(frozen=True)
class Defaults:
    """Steps, guidance scale and options of the pipeline's call where the user gives none."""

    steps: int = 50
    guidance: float = 7.5
    call: Mapping[str, Any] = field(default_factory=dict)


class _File(Form):
    """`stereoclinic.json`, which may lie in a model's folder."""

    steps: int = Field(default=Defaults.steps, ge=1)
    guidance: float = Field(default=Defaults.guidance, ge=0)
    call: dict[str, Any] = Field(default_factory=dict)


def check_class(kind: type, components: Iterable[str], model: str) -> None:
    """Refuse a pipeline class that does not draw images from text with one denoiser.

    Args:
        kind: The class.
        components: Names of its parts.
        model: Its name in errors.

    Raises:
        InputError: It is for something else.
    """
    components = set(components)
    parameters = inspect.signature(kind.__call__).parameters
    denoisers = [name for name in ("unet", "transformer") if name in components]
    more = [name for name in ("transformer_2", "unet_2", "prior", "prior_prior", "decoder") if name in components]
    why = next((reason for name, reason in _OTHER_TASKS.items() if name in parameters), "")
    if "controlnet" in components:
        why = _OTHER_TASKS["control_image"]
    elif "text_encoder_2" in components and "text_encoder" not in components and denoisers == ["unet"]:
        why = "an SDXL refiner only finishes another model's images; give the base model"
    elif not why and "prompt" not in parameters:
        why = "it takes no prompt; a text-to-image pipeline is expected"
    elif not why and (len(denoisers) != 1 or more):
        found = ", ".join([*denoisers, *more]) or "none"
        why = f"one denoiser is expected, a `unet` or a `transformer`; found {found}"
    elif not why and "num_inference_steps" not in parameters:
        why = "its call takes no num_inference_steps"
    if why:
        raise InputError(f"model {model!r} is a {kind.__name__}: {why}")


def check_scheduler(scheduler: Any, model: str) -> None:
    """Refuse a scheduler that cannot go from noise and text to an image, each sample by its own seed.

    Raises:
        InputError: It lacks a method, its step needs more than prediction, timestep and sample, or it draws noise
            from elsewhere than a generator that it is given.
    """
    name = type(scheduler).__name__
    advice = "give the pipeline another, such as DDIMScheduler or EulerDiscreteScheduler"
    missing = [each for each in ("set_timesteps", "step") if not hasattr(scheduler, each)]
    if missing:
        raise InputError(f"model {model!r}: its {name} has no {missing[0]}; {advice}")
    parameters = inspect.signature(scheduler.step).parameters
    required = [
        each.name
        for each in list(parameters.values())[3:]
        if each.default is each.empty and each.kind != each.VAR_KEYWORD
    ]
    if required:
        raise InputError(f"model {model!r}: a step of its {name} needs {', '.join(required)}; {advice}")
    if "s_noise" in parameters and "generator" not in parameters:
        raise InputError(
            f"model {model!r}: its {name} adds noise that cannot be seeded sample by sample, so a seed would not name"
            f" an image; {advice}"
        )


class Model:
    """A frozen text-to-image pipeline, and the options of its call.

    All parts are put in eval mode, as dropout would disturb every comparison. A safety checker is removed: it paints
    images black, and black images count as no group.

    Args:
        pipe: The pipeline.
        name: Kept in files; the pipeline's own name by default.
        folder: Its folder, if it is local.
        call: Further options of the pipeline's own call, such as `{"height": 512, "true_cfg_scale": 4.0}`.
        prepare: False leaves the pipeline unchanged, for learning about it only; an IP-Adapter then gets no image.

    Attributes:
        variant: Of its weight files, where they are not the plain ones.
        defaults: Steps, guidance scale and options of the call where the user gives none, from `stereoclinic.json` in
            its folder or from the pipeline's own call.

    Raises:
        InputError: The pipeline is for something else, or its call does not take an option.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        name: str = "",
        folder: Path | None = None,
        call: Mapping[str, Any] | None = None,
        prepare: bool = True,
    ) -> None:
        self.pipe, self.folder, self._prepared = pipe, folder, prepare
        self.variant: str | None = None
        self.name = name or str(getattr(pipe, "name_or_path", "") or "")
        check_class(type(pipe), (each for each, part in pipe.components.items() if part is not None), self.name)
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        self.defaults = self._read_defaults()
        self.call = self._checked({**self.defaults.call, **(call or {})})
        if prepare:
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    component.eval().requires_grad_(False)
            if getattr(pipe, "safety_checker", None) is not None:
                pipe.safety_checker = None
            pipe.set_progress_bar_config(disable=True)
        self._slot = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
        if getattr(inner(self.network), "is_cache_enabled", False):
            raise InputError(
                f"model {self.name!r}: its denoiser keeps a cache between calls, so that a prediction depends on the"
                " ones before it; call disable_cache() on it"
            )
        config = getattr(inner(self.network), "config", {})
        if any(config.get(name) is not None for name in ("num_class_embeds", "class_embed_type")):
            raise InputError(f"model {self.name!r}: its denoiser takes class labels; text alone is supported")
        taken = config.get("in_channels")
        made = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", taken)
        if self._slot == "unet" and taken != made:
            raise InputError(
                f"model {self.name!r}: its UNet takes {taken} channels, its autoencoder makes {made}; inpainting and"
                " other image-conditioned variants are not supported, give the text-to-image model"
            )

    def _checked(self, call: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(name for name in self._parameters if name not in RESERVED and not name.startswith("callback"))
        for name in call:
            if name not in taken or name in RESERVED:
                why = "is set by stereo itself" if name in RESERVED else f"is not taken by {type(self.pipe).__name__}"
                raise InputError(f"call option {name!r} {why}; it takes {', '.join(taken)}")
        return call

    def _read_defaults(self) -> Defaults:
        path = self.folder / "stereoclinic.json" if self.folder else None
        if path is not None and path.is_file():
            file = parse(_File, read_json(path, "model's defaults"), f"model's defaults {path}")
            return Defaults(file.steps, file.guidance, file.call)
        names = ("num_inference_steps", "guidance_scale")
        steps, guidance = (getattr(self._parameters.get(name), "default", None) for name in names)
        return Defaults(
            steps=steps if isinstance(steps, int) else 50,
            guidance=guidance if isinstance(guidance, int | float) else 1.0,
        )

    def options(self, guidance: float, count: int = 1) -> dict[str, Any]:
        """Further arguments of the pipeline's call for `count` prompts.

        Raises:
            InputError: The pipeline takes no guidance scale, and `guidance` is not its default.
        """
        if not self.takes_guidance:
            if guidance != self.defaults.guidance:
                raise InputError(
                    f"guidance {guidance:g}: {type(self.pipe).__name__} takes no guidance_scale; leave it out, and see"
                    " what its call takes instead (true_cfg_scale, say) for --call"
                )
            return dict(self.call)
        return {**self._no_pictures(count), **self.call, "guidance_scale": guidance}

    def _no_pictures(self, count: int) -> dict[str, Any]:
        """Embeddings of no image for each of a U-Net's IP-Adapters, which need some."""
        layers = getattr(getattr(inner(self.network), "encoder_hid_proj", None), "image_projection_layers", ())
        given = {"ip_adapter_image", "ip_adapter_image_embeds"} & self.call.keys()
        if self._prepared or given or not layers or self._slot != "unet":
            return {}
        embeds = []
        for layer in layers:
            width = next(each.in_features for each in layer.modules() if isinstance(each, nn.Linear))
            shape = (2 * count, 1, width) if type(layer).__name__ == "ImageProjection" else (2 * count, 1, 1, width)
            embeds.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        return {"ip_adapter_image_embeds": embeds}

    @property
    def takes_guidance(self) -> bool:
        """Whether its call takes a guidance scale."""
        parameter = self._parameters.get("guidance_scale")
        return parameter is not None and parameter.default is not None

    @property
    def network(self) -> nn.Module:
        """The denoiser: the pipeline's present `unet` or `transformer`."""
        found: nn.Module = getattr(self.pipe, self._slot)
        return found

    def replace(self, network: nn.Module) -> None:
        """Put another network of the same shape in the denoiser's place."""
        setattr(self.pipe, self._slot, network)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs, also while its parts are offloaded."""
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""
        return next(inner(self.network).parameters()).dtype

    @property
    def about(self) -> dict[str, Any]:
        """How to open it again, as kept in files."""
        dtype = str(self.dtype).removeprefix("torch.")
        own = self.defaults.call
        call = {name: value for name, value in self.call.items() if name not in own or value != own[name]}
        found = {"model": self.name, "call": call} | ({} if dtype == "float32" else {"dtype": dtype})
        return found | ({} if self.variant is None else {"variant": self.variant})

    @property
    def training_steps(self) -> float:
        """The noisiest timestep, in the scheduler's units."""
        steps = self.pipe.scheduler.config.get("num_train_timesteps")
        return float(steps or 1000)

    @property
    def offloaded(self) -> bool:
        """Whether accelerate moves its parts between devices."""
        hooks = [getattr(part, "_hf_hook", None) for part in self.pipe.components.values()]
        return any(hook is not None for hook in hooks)

    def to(self, device: torch.device | str) -> Self:
        """Move all parts, unless accelerate does that."""
        if not self.offloaded:
            self.pipe.to(device)
        return self


def network_of(target: Any) -> nn.Module:
    """The denoiser of a model or a pipeline, or the denoiser itself, without the wrapper of `torch.compile`.

    Raises:
        InputError: There is none.
    """
    return inner(outer_network(target))


def outer_network(target: Any) -> nn.Module:
    """As `network_of`, with the wrapper of `torch.compile` if there is one.

    Raises:
        InputError: There is none.
    """
    if isinstance(target, nn.Module):
        return target
    if isinstance(target, Model):
        return target.network
    found = getattr(target, "transformer", None) or getattr(target, "unet", None)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"cannot damp a {type(target).__name__}; expected a diffusers pipeline with a U-Net or a transformer, or"
            " the denoiser itself"
        )
    return found
