"""What the commands say of prompts before they run: which name a group, and which the model does not read whole."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stereo_cli import common

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis


def note_named(rows: "Dataset", axis: "Axis") -> None:
    """Say that some of the neutral prompts name a group: the gate will leave such prompts alone."""
    from stereoclinic.prompts.sets import write
    from stereoclinic.sns.policy import named_groups

    found = [(prompt, groups) for prompt in map(write, rows) if (groups := named_groups(prompt, axis))]
    if found:
        prompt, groups = found[0]
        common.note(
            f"{len(found)} of {len(rows)} prompts name a group, and the gate leaves these alone: first {prompt!r}"
            f" ({', '.join(groups)})"
        )


def check_length(model: "Model", rows: "Dataset", axis: "Axis", guidance: float, steps: int, *more: "Dataset") -> None:
    """Say which prompts are too long for the model to read.

    Args:
        model: The pipeline.
        rows: Neutral prompts, of which those that name a group are made.
        axis: Its words do so.
        guidance: Scale.
        steps: Of the scheduler.
        *more: Further prompts, that name nobody.

    Raises:
        InputError: What is not read is the word of a group.
    """
    from stereoclinic.ddtd.trajectory import check_prompts
    from stereoclinic.pipelines.conditions import TOGETHER, cut_prompts
    from stereoclinic.prompts.sets import group_prompts, write

    texts = [[write(row), *group_prompts(row, axis)] for row in rows]
    others = [write(row) for each in more for row in each]
    cut = cut_prompts(model, [text for each in texts for text in each] + others, guidance, steps)
    long = set(cut)
    near = [{**row, "prompt": each[0]} for row, each in zip(rows, texts, strict=True) if not long.isdisjoint(each)]
    for start in range(0, len(near), TOGETHER):
        check_prompts(model, axis, near[start : start + TOGETHER], guidance, steps)
    note_cut(model, cut, guidance, steps)


def note_cut(model: "Model", cut: Sequence[str], guidance: float, steps: int) -> None:
    """Say from which word on the first of some prompts is not read, and how many more are cut."""
    from stereoclinic.pipelines.conditions import first_unread

    if cut:
        number, word = first_unread(model, cut[0], guidance, steps)
        more = f"; so are {len(cut) - 1} more" if len(cut) > 1 else ""
        common.note(
            f"prompt {cut[0]!r} is too long for the model, which does not read it from word {number} ({word}) on{more}"
        )
