"""Pipelines: opened, watched while they run, and the sites of their denoisers."""

from stereoclinic.pipelines.opening import model_folder, open_model, open_pipeline

__all__ = ["model_folder", "open_model", "open_pipeline"]
