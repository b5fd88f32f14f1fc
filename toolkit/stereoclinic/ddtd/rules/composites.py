"""Composites: which rule goes where. To add one, add a row to `COMPOSITES`, or write a TOML file.

name = "mine"
root = "plain"                              # or "rooted"
modulation = "constant"                     # or "halves": x (1 + scale) gives half to the modulation

[rules]                                     # by kind of operation; what is left out is as in epsilon-cp
attention = "attnlrp"                       # or "cp"
convolution = { rule = "gamma", gamma = 0.25 }

[[layers]]                                  # single layers; the first entry that fits counts, else [rules]
pattern = "*.to_v"                          # of the module path, and/or
depth = [0.0, 0.3]                          # of its place: 0 the first layer that the data meets, 1 the last
rule = "z_plus"
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import nn

from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules import layers as layer_rules
from stereoclinic.ddtd.rules.functions import Rule
from stereoclinic.ddtd.rules.layers import LayerRule
from stereoclinic.ddtd.rules.order import find_layers
from stereoclinic.errors import InputError
from stereoclinic.io.metadata import Form, parse
from stereoclinic.io.reading import read_toml


@dataclass(frozen=True)
class Choice:
    """A rule for the linear layers and convolutions that fit."""

    rule: Rule
    pattern: str = "*"  # of module paths, as of file names (`*`, `?`, `[...]`)
    depth: tuple[float, float] = (0.0, 1.0)  # from and to, both included: 0 is the first of all layers, 1 the last

    def __post_init__(self) -> None:
        if not 0 <= self.depth[0] <= self.depth[1] <= 1:
            raise InputError(f"depth {list(self.depth)}: expected [from, to] with 0 <= from <= to <= 1")

    def fits(self, name: str, depth: float) -> bool:
        return self.depth[0] <= depth <= self.depth[1] and fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Composite:
    """A named choice of rules.

    Attributes:
        name: Its name on the command line and in files.
        rules: The rule of each kind of operation, see `operations.KINDS`. Linear kinds are native unless named here;
            any other kind that is missing is refused.
        root: "plain" for R = a * g, "rooted" for R = (a - abar) * g, abar the mean over the group passes.
        strict: Refuse uncovered operations. False only for plain gradients, which need no rule.
        modulation: Share of scales and gates that depend on time or pooled text in a product with an activation:
            nothing ("constant"), or half ("halves").
        layers: Rules for single linear layers and convolutions; the first that fits goes before `rules`.
        source: Its file, for errors; empty where there is none.
    """

    name: str
    rules: Mapping[str, Rule]
    root: str = "plain"
    strict: bool = True
    modulation: str = "constant"
    layers: tuple[Choice, ...] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, choices in (("root", ("plain", "rooted")), ("modulation", ("constant", "halves"))):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} {value!r} of composite {self.name!r}: expected {' or '.join(choices)}")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))

    @property
    def by_terms(self) -> bool:
        """Whether any linear layer or convolution has a rule other than the native one."""
        return any(isinstance(rule, LayerRule) for rule in (*self.rules.values(), *(c.rule for c in self.layers)))

    def assign(self, model: nn.Module) -> list[tuple[nn.Parameter, Rule]]:
        """The weights of a model that `layers` chooses a rule for, each with its rule.

        Raises:
            InputError: An entry of `layers` fits no layer of the model, or see `find_layers`.
        """
        layers = find_layers(model)
        rules: dict[int, Rule] = {}  # by place in layers
        for i, choice in enumerate(self.layers, start=1):
            fitting = [place for place, layer in enumerate(layers) if choice.fits(layer.name, layer.depth)]
            if not fitting:
                raise InputError(
                    f"{self.source or f'composite {self.name!r}'}: layers entry {i} (pattern {choice.pattern!r}, depth "
                    f"{list(choice.depth)}) fits none of the {len(layers)} layers of {type(model).__name__}, such as "
                    f"{layers[0].name!r} and {layers[len(layers) // 2].name!r}"
                )
            rules = dict.fromkeys(fitting, choice.rule) | rules  # the first that fits counts
        return [(layer.weight, rules[place]) for place, layer in enumerate(layers) if place in rules]

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
        """SHA-256 of `describe()`."""
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
        InputError: No composite has that name; or as `read_composite`.
    """
    if Path(name).suffix == ".toml":
        return read_composite(Path(name))
    if str(name) not in COMPOSITES:
        raise InputError(
            f"composite {str(name)!r} is not known; choose one of {', '.join(sorted(COMPOSITES))}, or give a .toml file"
        )
    return COMPOSITES[str(name)]


class _LayerRule(Form):
    """The rule of a linear layer or convolution, and its parameter."""

    rule: Literal["native", "epsilon", "gamma", "z_plus", "w_squared"]
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        for name, value in (("epsilon", self.epsilon), ("gamma", self.gamma)):
            if (value is None) == (self.rule == name):
                raise ValueError(f"rule {self.rule!r} {'needs' if value is None else 'takes no'} {name}")
        return self

    def made(self) -> Rule:
        if self.epsilon is not None:
            return layer_rules.epsilon(self.epsilon)
        if self.gamma is not None:
            return layer_rules.gamma(self.gamma)
        return rules.native if self.rule == "native" else getattr(layer_rules, self.rule)


class _Entry(_LayerRule):
    """One of [[layers]]."""

    pattern: Annotated[str, Field(min_length=1)] = "*"
    depth: Annotated[tuple[float, float], Field(strict=False)] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if not {"pattern", "depth"} & self.model_fields_set:
            raise ValueError("expected a pattern, a depth = [from, to], or both")
        self.choice()
        return self

    def choice(self) -> Choice:
        return Choice(self.made(), self.pattern, self.depth)


_LayerRuleOrName = Annotated[_LayerRule, BeforeValidator(lambda x: {"rule": x} if isinstance(x, str) else x)]


class _Rules(Form):
    """[rules]: what is called "native" is passed back by the operation's own gradient."""

    linear: _LayerRuleOrName | None = None
    convolution: _LayerRuleOrName | None = None
    attention: Literal["cp", "attnlrp"] = "cp"
    silu: Literal["gate", "native"] = "gate"
    gelu: Literal["gate", "native"] = "gate"
    tanh: Literal["gate", "native"] = "gate"
    sigmoid: Literal["constant", "native"] = "constant"
    group_norm: Literal["constant_std", "native"] = "constant_std"
    layer_norm: Literal["constant_std", "native"] = "constant_std"
    rms_norm: Literal["constant_std", "native"] = "constant_std"
    product: Literal["halves", "native"] = "halves"
    division: Literal["constant_divisor", "native"] = "constant_divisor"

    def made(self) -> dict[str, Rule]:
        native = [kind for kind, value in self if value == "native"]
        layers = {kind: value.made() for kind, value in self if isinstance(value, _LayerRule)}
        return {**_GATES_AND_NORMS, **ATTENTION[self.attention], **dict.fromkeys(native, rules.native), **layers}


class _File(Form):
    """A composite file."""

    name: str
    root: Literal["plain", "rooted"] = "plain"
    modulation: Literal["constant", "halves"] = "constant"
    rules: _Rules = _Rules()
    layers: list[_Entry] = Field(default_factory=list)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.strip():
            raise ValueError("expected a name for the composite")
        if name in COMPOSITES:
            raise ValueError(f"{name!r} is that of a built-in composite; choose another")
        return name


def read_composite(path: Path) -> Composite:
    """Read a composite; what it does not name is as in `epsilon-cp`.

    Raises:
        InputError: The file cannot be read, or does not have the form shown at the head of this module.
    """
    source = f"composite file {path}"
    file = parse(_File, read_toml(path, "composite file"), source)
    layers = tuple(entry.choice() for entry in file.layers)
    return Composite(file.name, file.rules.made(), file.root, modulation=file.modulation, layers=layers, source=source)
