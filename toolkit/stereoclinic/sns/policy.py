"""Which images are treated, and how: the gate leaves some alone, the allocation gives the others a group.

    allot_masks(pipe, allotments(loaded_masks(pipe), prompts, seeds, axes=[axis]))     for a pipeline with masks loaded

    with Treatment(model, mask, axes=[axis]) as treatment:       for batch after batch
        treatment.begin(rows, prompts)      what each image of the next batch gets, from its own prompt and seed
        draw(model, rows, steps, guidance, prompts)

The gate: a prompt that names a group of an axis asks for that group, and its image is left untreated.

The gate looks for an axis's words, and those that its file lists under [also]. It finds whole words, in any case and
Unicode form, also as plurals and possessives, after a number ("1girl"), and phrases with spaces or hyphens
("dark-skinned", "dark skinned"). In Chinese, Japanese, Thai and other scripts without spaces it finds a word anywhere
in running text, also within a longer word. It makes mistakes:

    missed          names and what only implies a group ("Maria", "a bearded doctor"), other languages, misspellings,
                    "a black doctor" (although "a black coat" is not a person)
    false alarms    words with another meaning, beyond the few phrases of `unless` ("an old lamp", "a women's
                    magazine"), "not a man"; a second person counts on purpose ("a doctor and her patient")
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.text import any_of, folded
from stereoclinic.prompts.axes import Axis
from stereoclinic.sns.allocate import JOINT, allotted_group, shares_of, uniform
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

if TYPE_CHECKING:
    from stereoclinic.prompts.sets import Row


def allotments(
    mask: NeuronMask | Mapping[str, NeuronMask],
    prompts: Sequence[str],
    seeds: Sequence[int],
    axes: Sequence[Axis] = (),
    shares: Sequence[Mapping[str, float]] = (),
) -> list[Any]:
    """What each image gets of a mask, or of several by name, as `allot_masks` takes it.

    Pass several masks together, so that each image is allotted one joint group, such as "female" with "old". Asked
    about one by one, two masks would allot by the same draw, and all female images would be old.

    Args:
        mask: An allocating mask allots each image a group, from its prompt and seed alone; or masks by name.
        prompts: One for each image.
        seeds: One for each image.
        axes: Axes whose groups the gate looks for; empty treats every image.
        shares: Of the groups, as `shares_of` takes them; uniform by default.

    Returns:
        For each image its group, True if the mask does not allocate, or None if it is left untreated; for several masks
        a table from name to that.

    Raises:
        InputError: Not one seed for each prompt, or as `shares_of`.
    """
    if len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one of each for every image")
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    if isinstance(mask, NeuronMask):
        return _allotments(mask, shares_of(mask.groups, shares) if mask.allocates else None, rows, prompts, axes)
    kinds = {frozenset(part.groups): part.groups for part in mask.values() if part.allocates}
    joint = list(product(*kinds.values()))  # a single, empty one without any
    joint_shares = shares_of([JOINT.join(names) for names in joint], shares) if kinds else uniform(1)
    by_image: list[Any] = []
    for row, neutral in zip(rows, _neutral(prompts, axes), strict=True):
        names = joint[allotted_group(row, joint_shares)]
        groups = {key: next((name for name in names if name in part.groups), True) for key, part in mask.items()}
        by_image.append(groups if neutral else None)
    return by_image


class Treatment:
    """Damps by a mask within a `with` block; announce every batch by `begin`.

    Args:
        target: A diffusers pipeline, a `Model`, or the denoiser itself.
        mask: What to damp. An allocating one allots each image a group, from its prompt and seed alone.
        axes: Axes whose groups the gate looks for: a prompt that names one is left untreated. Empty treats all.
        strength: Scales the damping, 0 to 1.
        shares: Of the groups, as `shares_of` takes them; uniform by default.
        force: As in `suppress`.

    Raises:
        InputError: As `suppress` and `shares_of`.
    """

    def __init__(
        self,
        target: Any,
        mask: NeuronMask,
        axes: Sequence[Axis] = (),
        strength: float = 1.0,
        shares: Sequence[Mapping[str, float]] = (),
        force: bool = False,
    ) -> None:
        self.mask, self.axes = mask, list(axes)
        self.shares = shares_of(mask.groups, shares) if mask.allocates else None
        self.suppression = suppress(target, mask, strength, force=force)

    def allotment(self, rows: "Sequence[Row]", prompts: Sequence[str] | None = None) -> list[str | bool | None]:
        """What each image gets, as `allotments`.

        Args:
            rows: Samples with `prompt` and `seed`.
            prompts: What the images are conditioned on; the rows' own prompts by default.
        """
        texts = [row["prompt"] for row in rows] if prompts is None else prompts
        return _allotments(self.mask, self.shares, rows, texts, self.axes)

    def begin(self, rows: "Sequence[Row]", prompts: Sequence[str] | None = None) -> list[str | bool | None]:
        """Announce the images of the next batch; arguments and result are those of `allotment`."""
        allotted = self.allotment(rows, prompts)
        self.suppression.allot(allotted)
        return allotted

    def __enter__(self) -> Self:
        self.suppression.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.suppression.__exit__(*error)


def _allotments(
    mask: NeuronMask, shares: Tensor | None, rows: "Sequence[Row]", texts: Sequence[str], axes: Sequence[Axis]
) -> list[str | bool | None]:
    """The group depends on a row's prompt and seed, the gate on the text that the image is conditioned on."""
    neutral = _neutral(texts, axes)
    if shares is None:
        return [treated or None for treated in neutral]
    groups = [mask.groups[allotted_group(row, shares)] for row in rows]
    return [group if treated else None for group, treated in zip(groups, neutral, strict=True)]


def _neutral(texts: Sequence[str], axes: Sequence[Axis]) -> list[bool]:
    return [all(is_neutral(text, axis) for axis in axes) for text in texts]


def named_groups(prompt: str, axis: Axis) -> tuple[str, ...]:
    """The groups that a prompt names, in the axis's order.

    Args:
        prompt: As it is given to the model.
        axis: Its words, `also` and `unless` are looked for.

    Examples:
        >>> from stereoclinic.prompts.axes import load_axis
        >>> named_groups("a doctor and her patient", load_axis("gender"))
        ('female',)
        >>> named_groups("a bearded doctor", load_axis("gender"))
        ()
    """
    text, _ = folded(prompt)
    text = any_of(tuple(axis.unless)).sub(" ", text)
    return tuple(
        group
        for group, word in zip(axis.groups, axis.words, strict=True)
        if any_of((word, *axis.also.get(group, ()))).search(text)
    )


def is_neutral(prompt: str, axis: Axis) -> bool:
    """Whether a prompt names no group, and is treated."""
    return not named_groups(prompt, axis)
