"""A mask in a folder or on the Hugging Face hub: its card, and the upload.

Metadata of a mask may come from a stranger. In a card they are text: one line, no markup, no links.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stereoclinic.errors import InputError, first_line
from stereoclinic.io.files import write_text
from stereoclinic.io.text import is_own_card, markdown, slug

if TYPE_CHECKING:
    from stereoclinic.sns.mask import NeuronMask

#: A mask's file in a folder, or in a repository on the Hugging Face hub.
FILENAME = "mask.safetensors"
README, LIBRARY = "README.md", "stereoclinic"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_MASKS = 10  # of a composition, whose making is shown
#: Entries of metadata that a card shows, and their names in it.
_MADE = {
    "model": "model", "axis": "axis", "words": "words of the groups", "labels": "made on prompts of", "seeds": "seeds",
    "samples": "samples", "composite": "relevance rules", "guidance": "guidance scale", "steps": "sampler steps",
    "unet_weights": "digest of the denoiser's weights",
}  # fmt: skip


class Judged(Protocol):
    """What a bench found, as `stereoclinic.judged` reads it from the folder of its results."""

    def section(self, mask: "NeuronMask") -> tuple[str, dict[str, Path]]:
        """Markdown, and the pictures in it by file name; raises InputError if the mask was not judged there."""


def write_card(
    folder: Path, mask: "NeuronMask", filename: str, repo: str, judged: Judged | None, license: str | None,
    base_model: str | None,
) -> None:  # fmt: skip
    """Make the folder, and write README.md and its pictures.

    A README.md that is not of stereoclinic is kept, and nothing is written.

    Raises:
        InputError: The folder cannot be made, license or base model is no identifier of the hub, or the mask was not
            judged there.
    """
    from huggingface_hub import ModelCard, ModelCardData

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"mask folder {folder} cannot be made ({error.strerror}); choose another") from error
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,49}", license):
        raise InputError(f"license {license!r:.60}; expected an identifier of the hub, such as apache-2.0")
    if base_model is not None and not _is_repo(base_model):
        raise InputError(f"base_model {base_model!r:.60}; expected OWNER/NAME on the hub")
    made_for = mask.metadata.get("model")
    if base_model is None and made_for is not None and _on_hub(made_for):
        base_model = made_for
    none = "Not measured: no results of `stereo bench` were given."
    found, pictures = (none, dict[str, Path]()) if judged is None else judged.section(mask)
    readme = folder / README
    if readme.exists() and not is_own_card(readme):
        return
    axes = dict.fromkeys(slug(str(made["axis"])) for made in mask.origins[:_MASKS] if made.get("axis"))
    data = ModelCardData(
        library_name=LIBRARY, license=license, base_model=base_model, pipeline_tag="text-to-image",
        tags=[LIBRARY, "bias", *axes],
    )  # fmt: skip
    if base_model:
        data["base_model_relation"] = "adapter"
    for name, picture in pictures.items():
        shutil.copyfile(picture, folder / name)
    text = _TEXT.format(
        title=markdown(" + ".join(axes) or "by hand"), damped=int((mask.factors < 1).flatten(0, -2).any(0).sum()),
        neurons=mask.factors.shape[-1], bins=mask.factors.shape[-2], code=_code(mask, filename, repo, base_model),
        groups=f" Groups: {', '.join(map(markdown, mask.groups))}." if mask.allocates else "", found=found,
        made="\n\n".join(map(_made, mask.origins[:_MASKS])),
    )  # fmt: skip
    write_text(readme, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))


def upload(api: Any, folder: str, filename: str, repo: str, **options: Any) -> str:
    """Upload a folder that `save_pretrained` wrote; another card that the repository has stays. Returns the address."""
    options.setdefault("commit_message", f"Upload {filename}")
    revision = options.get("revision")
    known = None if options.get("create_pr") else revision
    if api.file_exists(repo, README, revision=known):
        theirs = api.hf_hub_download(repo, README, revision=known)
        options["ignore_patterns"] = [] if is_own_card(Path(theirs)) else [README, "*.png"]
    return str(api.upload_folder(repo_id=repo, folder_path=folder, **options).commit_url)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = first_line(error).rstrip(".")
        raise InputError(f"{what} ({reason}); check the name, the network and `hf auth login`") from error


def _is_repo(name: str) -> bool:
    return re.fullmatch(f"{_PART}/{_PART}", name) is not None


def _on_hub(model: str) -> bool:
    """Whether the name of a model is one of the hub, as far as can be told: not that of a folder."""
    return _is_repo(model) and not Path(model).exists()


def _code(mask: "NeuronMask", filename: str, repo: str, base_model: str | None) -> str:
    """How to use it, in five lines."""
    model = str(mask.metadata.get("model") or "")
    embedded = re.fullmatch(r"portraits(-flow)?", model) is not None
    name = base_model or (model if embedded else "FOLDER/OF/THE/MODEL")
    which = json.dumps(repo) if filename == FILENAME else f"NeuronMask.from_pretrained({repo!r}, {filename!r})"
    names = ["allot_masks"] * mask.allocates + ["load_mask", "open_pipeline"]
    names = (["NeuronMask"] if filename != FILENAME else []) + names
    lines = [
        f"from stereoclinic import {', '.join(names)}",
        f'pipe = open_pipeline("{name}")',
        f"load_mask(pipe, {which})",
        *([f"allot_masks(pipe, [{json.dumps(mask.groups[0])}])"] if mask.allocates else []),
        'image = pipe("a photo of a doctor").images[0]',
    ]
    return "\n".join(lines)


def _made(metadata: Mapping[str, Any]) -> str:
    """How one mask was made, as a list; of a path only the last part, which is no business of a reader."""
    entries = {name: metadata.get(key) for key, name in _MADE.items()}
    if isinstance(model := metadata.get("model"), str) and not _on_hub(model):
        entries["model"] = re.split(r"[\\/]", model)[-1]
    entries["chosen by"] = (metadata.get("selection") or {}).get("method")
    entries["version of stereoclinic"] = (metadata.get("versions") or {}).get(LIBRARY)
    lines = [f"- {name}: {markdown(_spelt(value))}" for name, value in entries.items() if value not in (None, "", [])]
    return "\n".join(lines) or "By hand: the file holds no record."


def _spelt(value: Any) -> str:
    return ", ".join(map(str, value[:50])) if isinstance(value, list) else str(value)


_TEXT = """# Neuron mask: {title}

Damping factors for a text-to-image diffusion model, meant to narrow the parity gap of an axis of bias. Of {neurons:,}
neurons it damps {damped:,}, in {bins:,} bins of timesteps.{groups} It fits the weights that it was made for, and is
refused on others.

## Use

```python
{code}
```

## What was measured

{found}

## How it was made

{made}
"""
