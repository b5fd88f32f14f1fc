"""LoRA adapters under rules that share a layer's relevance term by term: read as if they were merged.

    z  = w x + b + sum_i c_i B_i A_i x        the forward pass of peft; it stays so, bit for bit
    w' = w + sum_i c_i B_i A_i                the weight that the rule reads: the one layer z = w' x + b'

The native rule gives both the same relevance. Gamma and z+ weigh single terms, and w, A and B have other terms than w'.
So the call with w passes back what the rule of w' does, and the results of A and B are constants, which get nothing of
the sum's relevance. Nothing is changed in the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.rules.functions import Rule, TorchFunction, constant
from stereoclinic.ddtd.rules.layers import LayerRule
from stereoclinic.errors import UncoveredOperation


def find_adapted(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """The layers of a model that peft put an adapter on, each with the weight that is adapted."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if hasattr(module, "get_delta_weight") and isinstance(base, nn.Linear | nn.modules.conv._ConvNd):
            yield module, cast(nn.Parameter, base.weight)


def as_if_merged(module: nn.Module, rule: LayerRule) -> Iterator[tuple[nn.Parameter, Rule]]:
    """The rules of an adapted layer's weights: the layer's own reads them merged, its adapters' are constants."""
    layer: Any = module
    yield layer.base_layer.weight, AsIfMerged(rule, module)
    for part in (*getattr(layer, "lora_A", {}).values(), *getattr(layer, "lora_B", {}).values()):
        yield part.weight, constant


@dataclass(frozen=True)
class AsIfMerged:
    """A layer rule on the merged weight of an adapted layer; called as every rule is."""

    rule: LayerRule
    module: nn.Module  # peft's; which adapters are active, and their scales, is read at each call

    def __call__(
        self,
        function: TorchFunction,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Raises UncoveredOperation for an adapter that is not a plain LoRA, or one with dropout at work."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            merged = self._merged(weight, bias)
        if merged is None:
            return self.rule(function, input, weight, bias, *args, **kwargs)
        return self.rule(function, input, *merged, *args, called=(weight, bias), **kwargs)

    def _merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """w' and b', or None where no adapter is active (disabled, merged, of another layer)."""
        layer: Any = self.module
        if layer.disable_adapters or layer.merged:
            return None
        active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", layer.active_adapters)]
        if not active:
            return None
        why = self._why_not(active)
        if why:
            raise UncoveredOperation(
                f"the adapter {active[0]!r} on a {type(layer.base_layer).__name__} has no relevance rule "
                f"`{self.rule.name}`: {why}; merge it first, or use a composite whose linear layers and convolutions "
                "are native, such as `epsilon-cp`"
            )
        weight = weight + sum(layer.get_delta_weight(name).to(weight.dtype) for name in active)
        for name in active:
            if layer.lora_B[name].bias is not None:
                more = layer.lora_B[name].bias * layer.scaling[name]
                bias = more if bias is None else bias + more.to(bias.dtype)
        return weight, bias

    def _why_not(self, active: list[str]) -> str:
        """Why the active adapters do not amount to one weight, or an empty string."""
        layer: Any = self.module
        if not hasattr(layer, "lora_A"):
            return f"{type(layer).__module__}.{type(layer).__name__} is not a LoRA"
        for name in active:
            variant = getattr(layer, "lora_variant", {}).get(name)
            if variant is not None:
                return f"{type(variant).__name__} is more than a product of two matrices"
            if layer.lora_dropout[name].training and getattr(layer.lora_dropout[name], "p", 0):
                return "its dropout is active (call eval on the model)"
        base = layer.base_layer
        if getattr(base, "groups", 1) > 1 or getattr(base, "padding_mode", "zeros") != "zeros":
            return "its convolution has groups or a padding other than zeros"
        return ""
