"""What a bench found, as Markdown: the card of its folder as a data set, and a section of a mask's card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import BALANCED
from stereoclinic.evaluation.results import Results
from stereoclinic.evaluation.verdict import verdicts
from stereoclinic.io.files import plain
from stereoclinic.io.text import markdown, slug
from stereoclinic.report.tables import Cell, main_table
from stereoclinic.sns.hub import LIBRARY
from stereoclinic.sns.mask import NeuronMask

Data = Mapping[str, Any]


@dataclass(frozen=True)
class JudgedFolder:
    """Results of a bench in their folder, for the card of a mask that was judged."""

    data: Data
    folder: Path

    def section(self, mask: NeuronMask) -> tuple[str, dict[str, Path]]:
        """Verdict, table and sheet of one mask at each guidance scale, and the files of the sheets.

        Raises:
            InputError: No judged mask has this mask's metadata.
        """
        made = json.loads(json.dumps(plain(mask.metadata)))
        records = self.data["provenance"].get("masks") or {}
        own = ("file", "other_weights")
        same = [name for name, each in records.items() if {k: v for k, v in each.items() if k not in own} == made]
        if not same:
            raise InputError(
                f"{self.folder}: this mask was not judged there (it has {', '.join(records) or 'no mask'})"
            )
        experiments = self.data["experiments"]
        files = {file: self.folder / file for _, arm, file in sheets(experiments) if arm == same[0]}
        files = {file: path for file, path in files.items() if path.is_file()}
        strength = self.data["provenance"].get("strength", 1)
        note = "" if strength == 1 else f"Measured at strength {strength:g}.\n\n"
        return note + _found(experiments, [same[0]], set(files)), files


def judged(folder: str | Path) -> JudgedFolder:
    """The results of `stereo bench`, to be shown on the card of a mask.

    Args:
        folder: Where the bench wrote its results.json and pictures.

    Raises:
        InputError: As `Results.load`.

    Examples:
        mask.push_to_hub("owner/gender-mask", results=judged("stereo-bench"), license="apache-2.0")
    """
    path = Path(folder)
    return JudgedFolder(Results.load(path).data, path if path.is_dir() else path.parent)


def sheets(experiments: Sequence[Data]) -> Iterator[tuple[int, str, str]]:
    """Experiment, arm and file of each before-and-after sheet, for results as in results.json."""
    for i, results in enumerate(experiments):
        suffix = f"-guidance-{results['guidance']:g}" if i else ""
        for j, name in enumerate(results["masks"] or [BALANCED]):
            yield i, name, f"before_after{f'-{j}-{slug(name)}' if j else ''}{suffix}.png"


def dataset_card(experiments: Sequence[Data]) -> str:
    """The README.md of a bench's folder, whose header tells `datasets` where its images are."""
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [{"split": "train", "path": "images/**"}]
    data = DatasetCardData(
        tags=[LIBRARY, "bias", "synthetic"], configs=[{"config_name": "default", "data_files": files}]
    )
    found = _found(experiments, experiments[0]["masks"], {file for _, _, file in sheets(experiments)})
    text = _TEXT.format(axis=markdown(experiments[0]["axis"]), found=found)
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _found(experiments: Sequence[Data], masks: Sequence[str], pictures: set[str]) -> str:
    """Verdicts, tables and pictures: of these masks, the controls and the oracles."""
    parts = []
    for i, results in enumerate(experiments):
        scale = f" at guidance {results['guidance']:g}"
        prompts, images = len(results["labels"]), results["images_per_prompt"]
        parts.append(f"**Verdict{scale}**, from {prompts} prompts of {images} images per arm:")
        parts += [markdown(each.sentence, 5000) for each in verdicts(results) if each.arm in masks or not masks]
        parts.append(_table(results, masks))
        for at, arm, file in sheets(experiments):
            if at == i and file in pictures and (arm in masks or not masks):
                parts.append(f"![The same seeds untreated and treated{scale}]({file})")
    return "\n\n".join(parts)


def _table(results: Data, masks: Sequence[str]) -> str:
    """The main table; masks other than these are left out."""
    table = main_table(results)
    shown = [i for i, arm in enumerate(table.arms) if arm in masks or arm not in results["masks"]]
    lines = [["figure", "sampling noise", *(table.arms[i] for i in shown)]]
    lines += [[row.title, _cell(row.noise), *(_cell(row.cells[i]) for i in shown)] for row in table.rows]
    rows = [f"| {' | '.join(map(markdown, line))} |" for line in lines]
    return "\n".join([rows[0], "| --- " * len(lines[0]) + "|", *rows[1:], "", markdown(table.caption, 5000)])


def _cell(cell: Cell | None) -> str:
    return "-" if cell is None else " ".join((cell.text, *cell.below))


_TEXT = """# Images of a bench: {axis}

Images of the same seeds, drawn by a text-to-image model with and without masks, by `stereo bench` of the Python package
`stereoclinic`. Nobody in them exists. Groups are what a classifier read in the images, and it errs.

```python
from datasets import load_dataset
images = load_dataset("PATH/OF/THIS/FOLDER", split="train")  # columns arm, prompt, seed, group, probability, ...
```

`results.json` has every figure, and `report.html` shows them.

{found}
"""
