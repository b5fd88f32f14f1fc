"""How a file was made: what relevance, plans and masks say of their model, axis and samples."""

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Samples
from stereoclinic.prompts.streams import Stream


def made_by(model: Model, axis: Axis, samples: Samples | Stream, steps: int, guidance: float) -> dict[str, Any]:
    """Plain data for a file's metadata; `io.metadata` checks it when the file is read."""
    network = inner(model.network)
    return {
        **model.about,
        "unet_shapes": shapes_digest(network),
        "unet_weights": weights_digest(network),
        "axis": axis.name,
        "words": list(axis.words),
        **samples.about(),
        "scheduler": type(model.pipe.scheduler).__name__,
        "steps": steps,
        "guidance": guidance,
    }


def created_now() -> dict[str, Any]:
    """The versions that a file is made with, and the time."""
    return {
        "versions": {name: version(name) for name in ("stereoclinic", "torch", "diffusers", "lightning")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
