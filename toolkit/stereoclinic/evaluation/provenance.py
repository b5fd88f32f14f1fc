"""Where figures come from: model, masks, reader and versions, as plain data for results.json."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset

from stereoclinic.evaluation.draw import model_digest
from stereoclinic.evaluation.protocols import PublishedProtocol
from stereoclinic.evaluation.readers import Reader, fingerprint
from stereoclinic.io.digest import plain_digest, shapes_digest, weights_digest
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.sets import digest
from stereoclinic.sns.compat import has_other_weights
from stereoclinic.sns.mask import NeuronMask

#: Libraries whose versions figures may depend on.
_PACKAGES = (
    "stereoclinic",
    "torch",
    "diffusers",
    "transformers",
    "lightning",
    "torchmetrics",
    "datasets",
    "numpy",
    "safetensors",
)


def provenance(
    model: Model,
    axis: str,
    prompts: Dataset,
    masks: Mapping[str, NeuronMask],
    files: Mapping[str, Path],
    strength: float,
    reader: Reader,
    published: PublishedProtocol | None = None,
) -> dict[str, Any]:
    """What results depend on.

    Args:
        model: The pipeline.
        axis: Name of the axis.
        prompts: Neutral prompts.
        masks: By the name of their arm.
        files: Of the masks that were read from one.
        strength: Of every mask.
        reader: Of the images.
        published: The published protocol that was followed.
    """
    network = inner(model.network)
    return {
        "model": model.name,
        "call": model.call,
        "unet_shapes": shapes_digest(network),
        "unet_weights": weights_digest(network),
        "pipeline": model_digest(model),
        "scheduler": type(model.pipe.scheduler).__name__,
        "device": str(model.device),
        "axis": axis,
        "prompts": digest(prompts),
        "reader": reader.name,
        "reader_weights": plain_digest(fingerprint(reader)),
        "reader_limits": list(reader.limits),
        "reader_errors": [str(error) for error in reader.known_errors],
        **({} if published is None else {"protocol": published.says()}),
        "strength": strength,
        "masks": {
            name: {
                **mask.metadata,
                "file": str(files[name]) if name in files else None,
                "other_weights": has_other_weights(mask, network),
            }
            for name, mask in masks.items()
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    """None for a package that is run from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
