"""One call of a tiny random denoiser, and what makes the network and its arguments."""

# ruff: noqa: C408  (arguments read as they do in a call)

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

SAMPLES, TEXT, SIDE = 2, 5, 4  # rows, text tokens, side of the latents in patches


@dataclass
class Call:
    """One call of a network.

    Attributes:
        network: a diffusers denoiser in float32, frozen.
        kwargs: its arguments; the latents come first.
        text: the arguments that depend on the prompt.
    """

    network: nn.Module
    kwargs: dict[str, Any]
    text: list[Tensor]

    def __call__(self) -> Tensor:
        output = self.network(**self.kwargs, return_dict=False)
        sample = output[0] if isinstance(output, tuple) else output
        return torch.stack(list(sample)) if isinstance(sample, list) else sample

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call in another dtype."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            return type(value)(map(cast, value)) if isinstance(value, list | tuple) else value

        given = {id(x): i for i, x in enumerate(self.text)}
        text = [cast(x) for x in self.text]

        def replace(value: Any) -> Any:
            if id(value) in given:
                return text[given[id(value)]]
            return type(value)(map(replace, value)) if isinstance(value, list | tuple) else cast(value)

        return Call(self.network.to(dtype), {key: replace(value) for key, value in self.kwargs.items()}, text)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def build_network(kind: str, **config: Any) -> nn.Module:
    """Built from a configuration, no parameter left at zero or one: a rule that forgets it would not be seen."""
    network: nn.Module = getattr(diffusers, kind)(**config)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or not parameter.any() or name.endswith("scale_shift_table"):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.requires_grad_(False).eval()


def packed(width: int, **more: Any) -> dict[str, Any]:
    """Packed latents and token ids, as FLUX.1 takes them."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(SIDE).float(), torch.arange(SIDE).float())
    text = noise(SAMPLES, TEXT, width)
    call = dict(
        hidden_states=noise(SAMPLES, SIDE * SIDE, 4),
        timestep=torch.tensor([0.7, 0.7]),
        encoder_hidden_states=text,
        img_ids=ids,
        txt_ids=torch.zeros(TEXT, 3),
    )
    return call | more
