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

A user's own composite, read from TOML; its form is shown at the head of ``composites.py``.

The linear layers and convolutions of a model, in the order that the data meets them.

A model lists its parts in the order in which they were made, which for the UNets of diffusers is not the order in
which they run: ``mid_block`` is listed after ``up_blocks`` and the attentions of a block before its resnets. Some
transformers list what embeds the latents after what embeds the timestep or the text.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules import layers as layer_rules
from stereoclinic.ddtd.rules.functions import Rule
from stereoclinic.ddtd.rules.layers import LayerRule
from stereoclinic.errors import InputError
from stereoclinic.io.reading import read_toml


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
        return read_composite(Path(name))
    if str(name) not in COMPOSITES:
        raise InputError(
            f"composite {str(name)!r} is not known; choose one of {', '.join(sorted(COMPOSITES))}, or give a .toml file"
        )
    return COMPOSITES[str(name)]


_LAYER_KINDS = ("convolution", "linear")
#: Kinds whose one rule may be replaced by the operation's own gradient, and what the rule is called.
_RULE_OR_NATIVE = {
    "silu": "gate",
    "gelu": "gate",
    "tanh": "gate",
    "sigmoid": "constant",
    "group_norm": "constant_std",
    "layer_norm": "constant_std",
    "rms_norm": "constant_std",
    "product": "halves",
    "division": "constant_divisor",
}


def read_composite(path: Path) -> Composite:
    """Read a composite; what it does not name is as in ``epsilon-cp``.

    Raises:
        InputError: the file cannot be read or does not have the form shown in ``composites.py``.
    """
    data = read_toml(path, "composite file")
    try:
        return _build(data, f"composite file {path}")
    except InputError as error:
        raise InputError(f"composite file {path}: {error}") from error


def _build(data: dict[str, Any], source: str) -> Composite:
    _only(data, ("name", "root", "modulation", "rules", "layers"), "the file")
    name = data.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"name {name!r}: expected what the composite is to be called")
    if name in COMPOSITES:
        raise InputError(f"name {name!r} is that of a built-in composite; choose another")
    by_kind, layers = data.get("rules", {}), data.get("layers", [])
    if not isinstance(by_kind, dict):
        raise InputError("rules: expected a table, [rules]")
    if not isinstance(layers, list) or not all(isinstance(entry, dict) for entry in layers):
        raise InputError("layers: expected tables, each headed [[layers]]")
    chosen = dict(COMPOSITES["epsilon-cp"].rules)
    for kind, value in by_kind.items():
        chosen |= _rules_of(kind, value)
    choices = [_choice(entry, f"layers entry {i}") for i, entry in enumerate(layers, start=1)]
    return Composite(
        name,
        chosen,
        data.get("root", "plain"),
        modulation=data.get("modulation", "constant"),
        layers=tuple(choices),
        source=source,
    )


def _rules_of(kind: str, value: Any) -> dict[str, Rule]:
    """The rules that one line of [rules] sets."""
    where = f"rules.{kind}"
    if kind in _LAYER_KINDS:
        table = {"rule": value} if isinstance(value, str) else value
        if not isinstance(table, dict):
            raise InputError(f"{where} = {value!r}: expected the name of a rule, or {{ rule = NAME, ... }}")
        return {kind: _layer_rule(table, where)}
    if kind == "attention":
        return dict(ATTENTION[_one_of(value, ATTENTION, where)])
    if kind in _RULE_OR_NATIVE:
        ours = _RULE_OR_NATIVE[kind]
        native = _one_of(value, (ours, "native"), where) == "native"
        return {kind: rules.native} if native else {kind: COMPOSITES["epsilon-cp"].rules[kind]}
    raise InputError(f"kind {kind!r} in [rules]: expected {', '.join((*_LAYER_KINDS, 'attention', *_RULE_OR_NATIVE))}")


def _choice(entry: dict[str, Any], where: str) -> Choice:
    """One of [[layers]]."""
    where_it_goes = {key: entry[key] for key in ("pattern", "depth") if key in entry}
    if not where_it_goes:
        raise InputError(f"{where}: expected a pattern, a depth = [from, to], or both")
    pattern, depth = entry.get("pattern", "*"), entry.get("depth", [0.0, 1.0])
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"{where}: pattern {pattern!r}: expected one of module paths, such as '*.ff.net.2'")
    if not isinstance(depth, list) or len(depth) != 2 or not all(map(_is_number, depth)):
        raise InputError(f"{where}: depth {depth!r}: expected [from, to] with 0 <= from <= to <= 1")
    rule = _layer_rule({key: value for key, value in entry.items() if key not in where_it_goes}, where)
    try:
        return Choice(rule, pattern, (float(depth[0]), float(depth[1])))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _layer_rule(table: dict[str, Any], where: str) -> Rule:
    """The rule that ``{ rule = NAME, PARAMETER = NUMBER }`` asks for."""
    make = LAYER_RULES[_one_of(table.get("rule"), LAYER_RULES, where)]
    parameters = list(inspect.signature(make).parameters)
    _only(table, ("rule", *parameters), where)
    for parameter in parameters:
        if not _is_number(table.get(parameter)):
            raise InputError(f"{where}: {parameter} {table.get(parameter)!r}: expected a number of 0 or more")
    try:
        return make(*(float(table[parameter]) for parameter in parameters))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_number(value: Any) -> bool:
    most = sys.float_info.max  # TOML's integers have no end
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _one_of(value: Any, names: Iterable[str], where: str) -> str:
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{where}: rule {value!r}: expected one of {', '.join(names)}")
    return value


def _only(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in table if key not in keys]:
        raise InputError(f"{where} has an unknown key {unknown[0]!r}; expected {', '.join(keys)}")


#: What embeds the latents, and what ends a network that lists it early, in diffusers' denoisers.
_EMBEDS_LATENTS = ("conv_in", "x_embedder", "all_x_embedder", "pos_embed", "patch_embed", "img_in", "visual_embeddings")
_ENDS = ("all_final_layer",)
_WRAPPERS = {"base_layer", "_orig_mod"}  # peft's, and torch.compile's


@dataclass(frozen=True)
class Layer:
    """One weight of a linear layer or convolution.

    Attributes:
        name: module path. What peft or torch.compile put between is left out, and the weights of an adapter have
            the name of the layer that they adapt.
        depth: place among the named layers, 0 for the first that the data meets to 1 for the last.
        weight: the parameter by which a call is recognised, also under autocast.
    """

    name: str
    depth: float
    weight: nn.Parameter


def find_layers(model: nn.Module) -> list[Layer]:
    """The linear layers and convolutions of a model, in the order that the data meets them.

    Raises:
        InputError: the model has none, or its weights come and go (sequential offloading), so that a call cannot be
            told by its weight.
    """
    found: list[tuple[str, nn.Parameter]] = []
    for path, module in _walk(model, "", set()):
        weight = module._parameters.get("weight")
        if weight is None or not (hasattr(module, "in_features") or hasattr(module, "in_channels")):
            continue
        if weight.is_meta and hasattr(module, "_hf_hook"):
            raise InputError(
                f"the weights of {type(model).__name__} are loaded call by call (sequential offloading), so that rules "
                "by layer cannot be told apart; use enable_model_cpu_offload, or a composite without layers"
            )
        found.append((_public(path), weight))
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer or convolution: expected a denoiser's network")
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in found))}
    last = max(len(places) - 1, 1)
    return [Layer(name, places[name] / last, weight) for name, weight in found]


def _public(path: str) -> str:
    parts = []
    for part in path.split("."):
        if part.startswith("lora_"):
            break
        if part not in _WRAPPERS:
            parts.append(part)
    return ".".join(parts)


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in _in_order(module):
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _in_order(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by name: what embeds the latents; down, mid, up in a UNet; resnet, attention, resnet, ... in a block."""
    children = dict(module.named_children())
    first = [name for name in _EMBEDS_LATENTS if name in children]
    last = [name for name in _ENDS if name in children]
    if first or last:
        between = [name for name in children if name not in (*first, *last)]
        children = {name: children[name] for name in (*first, *between, *last)}
    if "mid_block" in children and "up_blocks" in children:
        names = [name for name in children if name != "mid_block"]
        names.insert(names.index("up_blocks"), "mid_block")
        children = {name: children[name] for name in names}
    if "resnets" in children and "attentions" in children:
        pairs = [
            [(f"{name}.{i}", child) for i, child in children.pop(name).named_children()]
            for name in ("resnets", "attentions")
        ]
        for pair in zip_longest(*pairs):
            yield from filter(None, pair)
    yield from children.items()
