"""Composites: which rule goes where. To add one, add a row to ``COMPOSITES``."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stereoclinic.ddtd import rules
from stereoclinic.ddtd.rules import Rule
from stereoclinic.errors import InputError


@dataclass(frozen=True)
class Composite:
    """A named choice of rules.

    Attributes:
        name: what the command line and the files call it.
        rules: the rule per kind of operation (the kinds are the keys of ``propagate.KINDS``). Kinds that are
            linear are native unless named here; any other kind that is missing is refused.
        root: "plain" for R = a * g, "rooted" for R = (a - abar) * g, abar the mean over the group passes.
        strict: refuse uncovered operations. False only for plain gradients, which need no rule.
    """

    name: str
    rules: Mapping[str, Rule]
    root: str = "plain"
    strict: bool = True

    def __post_init__(self) -> None:
        if self.root not in ("plain", "rooted"):
            raise InputError(f"root {self.root!r} of composite {self.name!r}: expected 'plain' or 'rooted'")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))


_GATES_AND_NORMS: dict[str, Rule] = {
    "silu": rules.silu,
    "gelu": rules.gelu,
    "group_norm": rules.group_norm,
    "layer_norm": rules.layer_norm,
    "rms_norm": rules.rms_norm,
    "square": rules.dead_end,  # with "inverse_root": a norm written out by hand, 1/std constant
    "inverse_root": rules.constant,
    "product": rules.product,
}

_CP: dict[str, Rule] = {
    "attention": rules.attention_cp,
    "softmax": rules.constant,
    "matmul": rules.matmul_scores,
}

_ATTNLRP: dict[str, Rule] = {
    "attention": rules.attention_attnlrp,
    "softmax": rules.native,
    "matmul": rules.matmul_halves,
}

COMPOSITES: Mapping[str, Composite] = MappingProxyType(
    {
        composite.name: composite
        for composite in (
            Composite("epsilon-cp", _GATES_AND_NORMS | _CP),
            Composite("epsilon-attnlrp", _GATES_AND_NORMS | _ATTNLRP),
            Composite("gradient", {}, strict=False),
        )
    }
)


def get_composite(name: str) -> Composite:
    """The composite registered under a name.

    Raises:
        InputError: no composite has that name.
    """
    if name not in COMPOSITES:
        raise InputError(f"composite {name!r} is not known; choose one of {', '.join(sorted(COMPOSITES))}")
    return COMPOSITES[name]
