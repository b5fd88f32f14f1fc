"""Composites: which rule goes where. To add one, add a row to ``COMPOSITES``, or write a TOML file.

name = "mine"
root = "plain"                                  # or "rooted"
modulation = "constant"                         # or "halves": x (1 + scale) gives half to the modulation

[rules]                                         # by kind of operation; what is not named is as in epsilon-cp
attention = "attnlrp"                           # or "cp"
convolution = { rule = "gamma", gamma = 0.25 }

[[layers]]                                      # by layer; the first that fits is taken, else the rule of its kind
pattern = "*.to_v"                              # of the module path, and/or
depth = [0.0, 0.3]                              # of its place: 0 the first layer that the data meets, 1 the last
rule = "z_plus"
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from stereoclinic.ddtd import layer_rules, rules
from stereoclinic.ddtd.layer_rules import LayerRule
from stereoclinic.ddtd.layers import find_layers
from stereoclinic.ddtd.rules import Rule
from stereoclinic.errors import InputError


@dataclass(frozen=True)
class Choice:
    """A rule for the linear layers and convolutions that fit.

    Attributes:
        rule: the rule.
        pattern: of the module path, as of file names (``*``, ``?``, ``[...]``).
        depth: from and to, both included, of the layer's place among all: 0 the first, 1 the last.
    """

    rule: Rule
    pattern: str = "*"
    depth: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.depth[0] <= self.depth[1] <= 1:
            raise InputError(f"depth {list(self.depth)}: expected [from, to] with 0 <= from <= to <= 1")

    def fits(self, name: str, depth: float) -> bool:
        return self.depth[0] <= depth <= self.depth[1] and fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Composite:
    """A named choice of rules.

    Attributes:
        name: what the command line and the files call it.
        rules: the rule per kind of operation (the kinds are the keys of ``operations.KINDS``). Kinds that are
            linear are native unless named here; any other kind that is missing is refused.
        root: "plain" for R = a * g, "rooted" for R = (a - abar) * g, abar the mean over the group passes.
        strict: refuse uncovered operations. False only for plain gradients, which need no rule.
        modulation: what scales and gates that depend on time or pooled text get of a product with an activation:
            nothing ("constant"), or half ("halves").
        layers: rules for single linear layers and convolutions; the first that fits goes before ``rules``.
        source: the file it was read from, or empty; what errors call it.
    """

    name: str
    rules: Mapping[str, Rule]
    root: str = "plain"
    strict: bool = True
    modulation: str = "constant"
    layers: tuple[Choice, ...] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.root not in ("plain", "rooted"):
            raise InputError(f"root {self.root!r} of composite {self.name!r}: expected 'plain' or 'rooted'")
        if self.modulation not in ("constant", "halves"):
            raise InputError(
                f"modulation {self.modulation!r} of composite {self.name!r}: expected 'constant' or 'halves'"
            )
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))

    @property
    def by_terms(self) -> bool:
        """Whether any linear layer or convolution has a rule other than the native one."""
        return any(isinstance(rule, LayerRule) for rule in (*self.rules.values(), *(c.rule for c in self.layers)))

    def assign(self, model: nn.Module) -> list[tuple[nn.Parameter, Rule]]:
        """The weights of a model that ``layers`` chooses a rule for, each with its rule.

        Raises:
            InputError: an entry of ``layers`` fits no layer of the model, or see ``find_layers``.
        """
        layers = find_layers(model)
        for i, choice in enumerate(self.layers, start=1):
            if not any(choice.fits(layer.name, layer.depth) for layer in layers):
                raise InputError(
                    f"{self.source or f'composite {self.name!r}'}: layers entry {i} (pattern {choice.pattern!r}, depth "
                    f"{list(choice.depth)}) fits none of the {len(layers)} layers of {type(model).__name__}, which are "
                    f"called such as {layers[0].name!r} and {layers[len(layers) // 2].name!r}"
                )
        fitting = ((layer, next((c for c in self.layers if c.fits(layer.name, layer.depth)), None)) for layer in layers)
        return [(layer.weight, choice.rule) for layer, choice in fitting if choice is not None]

    def describe(self) -> dict[str, Any]:
        """Plain data that says exactly which rules these are; equal for equal composites, in every session."""
        return {
            "name": self.name,
            "root": self.root,
            "strict": self.strict,
            "modulation": self.modulation,
            "rules": {kind: _describe(rule) for kind, rule in sorted(self.rules.items())},
            "layers": [
                {"pattern": choice.pattern, "depth": [float(end) for end in choice.depth], **_describe(choice.rule)}
                for choice in self.layers
            ],
        }

    def digest(self) -> str:
        """SHA-256 of ``describe()``."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def _describe(rule: Rule) -> dict[str, Any]:
    if isinstance(rule, LayerRule):
        return {"rule": rule.name, **rule.parameters}
    return {"rule": getattr(rule, "__name__", type(rule).__name__)}


_GATES_AND_NORMS: dict[str, Rule] = {
    "silu": rules.silu,
    "gelu": rules.gelu,
    "tanh": rules.tanh,
    "sigmoid": rules.constant,
    "group_norm": rules.group_norm,
    "layer_norm": rules.layer_norm,
    "rms_norm": rules.rms_norm,
    "square": rules.dead_end,  # with "inverse_root": a norm written out by hand, 1/std constant
    "inverse_root": rules.constant,
    "product": rules.product,
    "division": rules.quotient,
}

#: How softmax attention is propagated, in one call or written out: the rules of its three kinds.
ATTENTION: Mapping[str, Mapping[str, Rule]] = {
    "cp": {"attention": rules.attention_cp, "softmax": rules.constant, "matmul": rules.matmul_scores},
    "attnlrp": {"attention": rules.attention_attnlrp, "softmax": rules.native, "matmul": rules.matmul_halves},
}

#: Rules for linear layers and convolutions by name; each is made from its parameters.
LAYER_RULES: Mapping[str, Callable[..., Rule]] = {
    "native": lambda: rules.native,
    "epsilon": layer_rules.epsilon,
    "gamma": layer_rules.gamma,
    "z_plus": lambda: layer_rules.z_plus,
    "w_squared": lambda: layer_rules.w_squared,
}

_CP = {**_GATES_AND_NORMS, **ATTENTION["cp"]}
_ATTNLRP = {**_GATES_AND_NORMS, **ATTENTION["attnlrp"]}
_GAMMA: dict[str, Rule] = {"convolution": layer_rules.gamma(0.25)}
_Z_PLUS: dict[str, Rule] = {"convolution": layer_rules.z_plus, "linear": layer_rules.z_plus}
_FIRST = Choice(layer_rules.w_squared, depth=(0.0, 0.0))

COMPOSITES: Mapping[str, Composite] = MappingProxyType(
    {
        composite.name: composite
        for composite in (
            Composite("epsilon-cp", _CP),
            Composite("epsilon-attnlrp", _ATTNLRP),
            Composite("gamma-cp", _CP | _GAMMA),
            Composite("gamma-attnlrp", _ATTNLRP | _GAMMA),
            Composite("zplus-cp", _CP | _Z_PLUS),
            Composite("deep-taylor", _CP | _Z_PLUS, layers=(_FIRST,)),
            Composite("gradient", {}, strict=False),
        )
    }
)


def get_composite(name: str | Path) -> Composite:
    """The composite registered under a name, or a user's own from a file that ends in .toml.

    Raises:
        InputError: no composite has that name, or the file is not of the form that the head of this module shows.
    """
    if Path(name).suffix == ".toml":
        from stereoclinic.ddtd.composite_file import read_composite  # which needs the names above

        return read_composite(Path(name))
    if str(name) not in COMPOSITES:
        raise InputError(
            f"composite {str(name)!r} is not known; choose one of {', '.join(sorted(COMPOSITES))}, or give a .toml file"
        )
    return COMPOSITES[str(name)]
