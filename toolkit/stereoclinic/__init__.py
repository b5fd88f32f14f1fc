"""Find where a stereotype lives inside a text-to-image diffusion model, damp it, and measure what that did.

    from stereoclinic import NeuronMask, load_axis, locate, open_model, suppress, treatment_plan

Public names are imported when they are first used, so that `import stereoclinic` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stereoclinic.ddtd.conservation import Conservation, check
    from stereoclinic.ddtd.locate import DDTD, locate
    from stereoclinic.ddtd.propagate import propagate
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.ddtd.trajectory import Settings
    from stereoclinic.errors import Incomplete, InputError
    from stereoclinic.pipelines import Model, open_model, open_pipeline
    from stereoclinic.prompts.axes import Axis, load_axis
    from stereoclinic.prompts.sets import load_prompts, with_seeds
    from stereoclinic.sns.adapter import (
        active_masks,
        allot_masks,
        disable_masks,
        enable_masks,
        load_mask,
        loaded_masks,
        set_masks,
        unload_mask,
    )
    from stereoclinic.sns.allocate import shares_of
    from stereoclinic.sns.compose import compose
    from stereoclinic.sns.damp import suppress
    from stereoclinic.sns.dose import find_dose
    from stereoclinic.sns.fuse import fuse, is_fusable, is_fused, save_fused, unfuse
    from stereoclinic.sns.linear import choose, treatment_plan
    from stereoclinic.sns.mask import NeuronMask
    from stereoclinic.sns.plan import plan_stepwise
    from stereoclinic.sns.policy import Treatment, allotments, named_groups
    from stereoclinic.sns.select import Selection, top_k
    from stereoclinic.sns.stepwise import Stepwise

_HOMES = {
    "Axis": "prompts.axes",
    "Conservation": "ddtd.conservation",
    "DDTD": "ddtd.locate",
    "Incomplete": "errors",
    "InputError": "errors",
    "Model": "pipelines.model",
    "NeuronMask": "sns.mask",
    "Relevance": "ddtd.relevance",
    "Selection": "sns.select",
    "Settings": "ddtd.trajectory",
    "Stepwise": "sns.stepwise",
    "Treatment": "sns.policy",
    "active_masks": "sns.adapter",
    "allot_masks": "sns.adapter",
    "allotments": "sns.policy",
    "check": "ddtd.conservation",
    "choose": "sns.linear",
    "compose": "sns.compose",
    "disable_masks": "sns.adapter",
    "enable_masks": "sns.adapter",
    "find_dose": "sns.dose",
    "fuse": "sns.fuse",
    "is_fusable": "sns.fuse",
    "is_fused": "sns.fuse",
    "load_axis": "prompts.axes",
    "load_mask": "sns.adapter",
    "load_prompts": "prompts.sets",
    "loaded_masks": "sns.adapter",
    "locate": "ddtd.locate",
    "named_groups": "sns.policy",
    "open_model": "pipelines",
    "open_pipeline": "pipelines",
    "plan_stepwise": "sns.plan",
    "propagate": "ddtd.propagate",
    "save_fused": "sns.fuse",
    "set_masks": "sns.adapter",
    "shares_of": "sns.allocate",
    "suppress": "sns.damp",
    "top_k": "sns.select",
    "treatment_plan": "sns.linear",
    "unfuse": "sns.fuse",
    "unload_mask": "sns.adapter",
    "with_seeds": "prompts.sets",
}

__all__ = [  # noqa: RUF022 (the order of _HOMES)
    "Axis",
    "Conservation",
    "DDTD",
    "Incomplete",
    "InputError",
    "Model",
    "NeuronMask",
    "Relevance",
    "Selection",
    "Settings",
    "Stepwise",
    "Treatment",
    "active_masks",
    "allot_masks",
    "allotments",
    "check",
    "choose",
    "compose",
    "disable_masks",
    "enable_masks",
    "find_dose",
    "fuse",
    "is_fusable",
    "is_fused",
    "load_axis",
    "load_mask",
    "load_prompts",
    "loaded_masks",
    "locate",
    "named_groups",
    "open_model",
    "open_pipeline",
    "plan_stepwise",
    "propagate",
    "save_fused",
    "set_masks",
    "shares_of",
    "suppress",
    "top_k",
    "treatment_plan",
    "unfuse",
    "unload_mask",
    "with_seeds",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
