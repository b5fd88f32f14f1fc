"""Pipelines: opened, watched while they run, and the sites of their denoisers."""

from typing import TYPE_CHECKING

from stereoclinic.pipelines.opening import BUILT_IN, DTYPES, model_folder, open_model, open_pipeline

if TYPE_CHECKING:
    from stereoclinic.pipelines.model import Model

__all__ = ["BUILT_IN", "DTYPES", "Model", "model_folder", "open_model", "open_pipeline"]


def __getattr__(name: str) -> object:
    if name == "Model":  # only then, as it takes diffusers
        from stereoclinic.pipelines.model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
