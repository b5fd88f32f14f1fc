"""Any image classifier of the hub, or in a local folder, as a reader: `hf:<model>`.

Its classes become the groups of an axis: by their names, by `[reader.hf]` in the axis's file (FairFace's "Male", its
bins of age), or by the user's class=group. Several classes of one group are added up. Classes that show no group are
added up as one more class, "no group".
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.reader_kinds import Request
from stereoclinic.evaluation.readers.base import REST, Reader
from stereoclinic.evaluation.readers.pretrained import open_model, open_part, open_pictures, pixels
from stereoclinic.io.reading import read_json, read_toml
from stereoclinic.prompts.axes import Axis

Pairs = list[tuple[str, str]]  # class, group


class HuggingFaceReader(Reader):
    """An image classifier.

    Args:
        model: A hub id or a local folder of a model for image classification.
        axes: Those it is to read. The first must be readable; of the others, those that are.
        given: Class and group, as from `parse_classes`.
        device: Where it runs.

    Raises:
        InputError: No classifier under this name, or it cannot tell the first axis's groups apart.
    """

    def __init__(self, model: str, axes: Sequence[Axis], given: Pairs | None = None, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModelForImageClassification

        self.name = f"hf:{model}"
        config = open_part(AutoConfig, model, f"reader {self.name!r}")
        if config.problem_type == "multi_label_classification":
            raise InputError(
                f"reader {self.name!r} gives several labels per image; one that names a single class is needed"
            )
        self.labels = [str(config.id2label[column]) for column in sorted(config.id2label)]
        _check_groups(given or [], axes)
        columns = {axis.name: columns_of(axis, self.labels, given or []) for axis in axes}
        if axes and columns[axes[0].name] is None:
            shown = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
            raise InputError(
                f"reader {self.name!r} has no classes for each of {', '.join(axes[0].groups)}; it has {shown}. Say"
                " which show them: --reader-classes CLASS=GROUP,..."
            )
        self.columns = {name: found for name, found in columns.items() if found is not None}
        self.classes = {
            axis.name: (*axis.groups, REST) if self._of_no_group(axis.name) else axis.groups
            for axis in axes
            if axis.name in self.columns
        }
        self.model = open_model(AutoModelForImageClassification, model, f"reader {self.name!r}").to(device)
        self.processor = open_pictures(model, f"reader {self.name!r}")
        self.limits = (
            f"It knows the classes {', '.join(self.labels)} alone, and names one of them for any image.",
            *(
                f"On {name}, classes of no group are left out of the shares, in which an image counts by what is left;"
                f" how often one of them is seen is given separately: {', '.join(rest)}."
                for name in self.columns
                if (rest := self._of_no_group(name))
            ),
            "How often it is wrong on generated images is not known here; see its model card.",
        )

    @torch.no_grad()
    def read(self, images: Tensor, persons: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1], of any size -> probabilities (n, classes) for each axis, as in `classes`."""
        values = pixels(self.processor, images).to(self.model.device)
        each = self.model(pixel_values=values).logits.double().softmax(1).cpu()  # (n, classes)
        found = {}
        for name, groups in self.columns.items():
            # never 0 together: what is read of the groups is divided by their sum
            shown = torch.stack([each[:, columns].sum(1) for columns in groups], 1).clamp_min(1e-12)
            if self._of_no_group(name):
                shown = torch.cat([shown, (1 - shown.sum(1, keepdim=True)).clamp_min(0)], 1)
            found[name] = shown.float()
        return found

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, F): the last hidden state, averaged over places."""
        values = pixels(self.processor, images).to(self.model.device)
        last: Tensor = self.model(pixel_values=values, output_hidden_states=True).hidden_states[-1].float().cpu()
        return last.mean(dim=(2, 3)) if last.ndim == 4 else last.mean(dim=1)

    def _of_no_group(self, axis: str) -> list[str]:
        """Its classes that show no group of the axis."""
        used = {column for columns in self.columns[axis] for column in columns}
        return [label for column, label in enumerate(self.labels) if column not in used]


def open_classifier(request: Request) -> Reader:
    """`hf:MODEL`."""
    return HuggingFaceReader(request.model, request.axes, parse_classes(request.classes), request.device)


def _check_groups(given: Pairs, axes: Sequence[Axis]) -> None:
    known = [group for axis in axes for group in axis.groups]
    if axes and (astray := [group for _, group in given if group not in known]):
        raise InputError(
            f"--reader-classes: no group {astray[0]!r}; axis {axes[0].name!r} has {', '.join(axes[0].groups)}"
        )


def parse_classes(given: Iterable[str]) -> Pairs:
    """Parse `--reader-classes`: CLASS=GROUP,CLASS=GROUP, or a .toml or .json file with group = [classes].

    Raises:
        InputError: Another form, or no such file.
    """
    pairs: Pairs = []
    for text in given:
        if Path(text).suffix in (".toml", ".json"):
            pairs += _from_file(Path(text))
            continue
        for part in text.split(","):
            label, _, group = part.rpartition("=")  # a class may hold the sign itself
            if not label.strip() or not group.strip():
                raise InputError(
                    f"--reader-classes {text!r}: expected CLASS=GROUP, such as Woman=female,Man=male, or a .toml file"
                    " with group = [classes]"
                )
            pairs.append((label.strip(), group.strip()))
    return pairs


def _from_file(path: Path) -> Pairs:
    table = (read_toml if path.suffix == ".toml" else read_json)(path, "--reader-classes")
    if not isinstance(table, dict) or not all(isinstance(labels, list) for labels in table.values()):
        raise InputError(f"--reader-classes {path}: expected a list of classes for each group, group = [classes]")
    return [(str(label), str(group)) for group, labels in table.items() for label in labels]


def columns_of(axis: Axis, labels: Sequence[str], given: Pairs) -> list[list[int]] | None:
    """The columns of a classifier that show each group of the axis, in its order; None if a group has none.

    Args:
        axis: Its groups. Without given classes, its names, words and the `[reader.hf]` of its file are looked for.
        labels: The classifier's classes.
        given: Class and group, as from `parse_classes`; groups of other axes are ignored.

    Raises:
        InputError: A given class is not the classifier's, or is given for two groups of the axis.
    """
    own = [(label, group) for label, group in given if group in axis.groups]
    if not own:
        own = [(label, group) for group, word in zip(axis.groups, axis.words, strict=True) for label in (group, word)]
        own += [(label, group) for group in axis.groups for label in axis.classes.get(group, ())]
    place = {_plain(label): column for column, label in enumerate(labels)}
    found: dict[int, str] = {}
    for label, group in own:
        column = place.get(_plain(label))
        if column is None:
            if (label, group) in given:
                shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
                raise InputError(f"--reader-classes: the reader has no class {label!r}; it has {shown}")
            continue
        if found.setdefault(column, group) != group:
            raise InputError(f"--reader-classes: class {label!r} is given for both {found[column]} and {group}")
    columns = [[column for column, group in found.items() if group == each] for each in axis.groups]
    return columns if all(columns) else None


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())
