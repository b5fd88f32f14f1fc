"""CLIP as a reader, asked in words: no training, and any axis whose groups can be put into words.

    e_g = normalised mean of normalised text embeddings, over templates x phrases of group g
    p   = softmax over g of  scale * <image embedding, e_g>        both normalised, scale learnt by the model

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section
3.1.4 (ensembling prompts).

The words come from the axis: `[reader.clip]` in its file, or else its words before "person". CLIP answers whatever is
asked, also of an image without a person. It is often wrong on race, which is therefore refused unless asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stereoclinic.errors import InputError
from stereoclinic.evaluation.reader_kinds import Request
from stereoclinic.evaluation.readers.base import KnownError, Reader
from stereoclinic.evaluation.readers.pretrained import open_model, open_part, open_pictures, pixels
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import write

#: What the evaluations in evaluation/protocols read with, so that figures compare.
DEFAULT = "openai/clip-vit-base-patch32"
TEMPLATES = (
    "a photo of {group}",
    "a portrait of {group}",
    "a headshot of {group}",
    "a picture of {group} at work",
    "a close-up photo of the face of {group}",
)
# The model size, the prompts and the publication behind these two figures are not on record. Tables 3 and 4 of Radford
# et al. 2021 (section 7.1) part the same data by race.
_SOURCE = (
    "of a CLIP model, perhaps another than this one: zero-shot, on record without its model size and publication;"
    " compare Radford et al. 2021, section 7.1"
)
KNOWN = {
    "gender": KnownError("gender", 0.962, "FairFace", _SOURCE),
    "race": KnownError("race", 0.592, "FairFace", _SOURCE),
}


def phrases(axis: Axis) -> list[tuple[str, ...]]:
    """The texts of each group, in the axis's order: its phrases, or its word before "person"."""
    person = {"pattern": "{person}", "article": "a", "person": "person"}
    return [
        axis.phrases.get(group) or (write(person, word),) for group, word in zip(axis.groups, axis.words, strict=True)
    ]


def texts(axis: Axis, person: str = "person") -> list[list[str]]:
    """Every phrase in every template, for each group of the axis."""
    templates = axis.templates or TEMPLATES
    return [
        [template.replace("{group}", phrase).replace("{person}", person) for template in templates for phrase in own]
        for own in phrases(axis)
    ]


class ClipReader(Reader):
    """Zero-shot CLIP with prompt ensembles.

    Args:
        model: A hub id or a local folder of a CLIPModel.
        axes: Those it is to read. The first must be readable; of the others, those of race are left out.
        allow_race: Read race, ethnicity and skin tone as well.
        device: Where it runs.

    Raises:
        InputError: No CLIP model under this name, or the first axis is of race and that was not asked for.
    """

    def __init__(
        self, model: str = DEFAULT, axes: Sequence[Axis] = (), allow_race: bool = False, device: str = "cpu"
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPModel

        self.name = f"clip:{model}"
        if axes and axes[0].about_race and not allow_race:
            raise InputError(
                f"axis {axes[0].name!r} is about race, ethnicity or skin tone, which CLIP often reads wrongly ("
                f"{KNOWN['race'].accuracy:.1%} right on FairFace); give another --reader, or --allow-race to read it"
                " anyway"
            )
        kind = open_part(AutoConfig, model, f"reader {self.name!r}").model_type
        if kind != "clip":
            raise InputError(
                f"reader {self.name!r}: the model is a {kind}, no CLIP; a classifier is opened by hf:{model}"
            )
        self.model = open_model(CLIPModel, model, f"reader {self.name!r}").to(device)
        self.tokenizer = open_part(AutoTokenizer, model, f"reader {self.name!r}")
        self.processor = open_pictures(model, f"reader {self.name!r}")
        self.axes = {axis.name: axis for axis in axes if allow_race or not axis.about_race}
        self.classes = {name: axis.groups for name, axis in self.axes.items()}
        self.by_person = any("{person}" in text for axis in self.axes.values() for own in phrases(axis) for text in own)
        race = any(axis.about_race for axis in self.axes.values())
        self.limits = (
            "CLIP names a group for any image, also for one that shows no person or several.",
            "It is often wrong on race, ethnicity and skin tone; they were read because that was asked for."
            if race
            else "It was not asked for race, ethnicity or skin tone, on which it is often wrong.",
        )
        known = dict.fromkeys("race" if axis.about_race else axis.name for axis in self.axes.values())
        self.known_errors = tuple(KNOWN[each] for each in known if each in KNOWN)
        self._embedded: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1] -> probabilities (n, K) for each axis.

        Args:
            images: Of any size.
            persons: The person in each image, for phrases that hold {person}; "person" if None.
        """
        seen = functional.normalize(self.features(images), dim=1)  # (n, D)
        scale = self.model.logit_scale.exp().cpu()
        named = list(persons) if persons is not None and self.by_person else ["person"] * len(seen)
        found = {}
        for name, axis in self.axes.items():
            groups = torch.stack([self._groups(axis, person) for person in named])  # (n, K, D)
            found[name] = (scale * torch.einsum("nd,nkd->nk", seen, groups)).softmax(1)
        return found

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, D) projected image embeddings, not normalised."""
        values = pixels(self.processor, images).to(self.model.device)
        embedded: Tensor = self.model.get_image_features(pixel_values=values).pooler_output
        return embedded.float().cpu()

    def _groups(self, axis: Axis, person: str) -> Tensor:
        """(K, D) normalised: one embedding for each group."""
        if (axis.name, person) not in self._embedded:
            each = [functional.normalize(self._embed(own), dim=1).mean(0) for own in texts(axis, person)]
            self._embedded[axis.name, person] = functional.normalize(torch.stack(each), dim=1)
        return self._embedded[axis.name, person]

    def _embed(self, lines: list[str]) -> Tensor:
        tokens = self.tokenizer(lines, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        embedded: Tensor = self.model.get_text_features(**tokens).pooler_output
        return embedded.float().cpu()


def open_clip(request: Request) -> Reader:
    """`clip` or `clip:MODEL`."""
    return ClipReader(request.model or DEFAULT, request.axes, request.allow_race, request.device)
