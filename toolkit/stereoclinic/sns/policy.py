"""A treatment: a mask as it is used, with its strength, the shares it allots groups by, and its gate.

allot_masks(pipe, allotments(loaded_masks(pipe), prompts, seeds, axes=[axis]))     for a pipeline with masks loaded

with Treatment(model, mask, axes=[axis]) as treatment:       for batch after batch
    treatment.begin(rows, prompts)      what each image of the next batch gets, from its own prompt and seed
    draw(model, rows, steps, guidance, prompts)

The gate: a prompt that names a group of an axis asks for it, and is left as it is.

By words, it sees an axis's own and those that its file lists under [also]: whole words, in any case and Unicode form,
also as plurals and possessives, after a number ("1girl"), a phrase's words apart or hyphenated ("dark-skinned", "dark
skinned"). In Chinese, Japanese, Thai and other scripts without spaces a word within running text counts, also where it
is a part of a longer one. Text cannot tell everything:

    missed          names and what only implies a group ("Maria", "a bearded doctor"), other languages, misspellings,
                    "a black doctor" (beside "a black coat")
    false alarms    words used otherwise, beyond the few phrases of `unless` ("an old lamp", "a women's magazine"),
                    "not a man"; a person beside the one who is drawn ("a doctor and her patient") is no false alarm

By lean, a prompt looks as if it named a group when the model predicts for it what it would for that group's prompt.
Occupations with a total stereotype look so too: see `by_lean`.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.text import any_of, folded
from stereoclinic.prompts.axes import Axis
from stereoclinic.sns.allocate import JOINT, allotted_group, shares_of, uniform
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

if TYPE_CHECKING:
    from stereoclinic.prompts.sets import Row


@overload
def allotments(
    mask: NeuronMask,
    prompts: Sequence[str],
    seeds: Sequence[int],
    axes: Sequence[Axis] = (),
    shares: Sequence[Mapping[str, float]] = (),
) -> list[str | bool | None]: ...


@overload
def allotments(
    mask: Mapping[str, NeuronMask],
    prompts: Sequence[str],
    seeds: Sequence[int],
    axes: Sequence[Axis] = (),
    shares: Sequence[Mapping[str, float]] = (),
) -> list[dict[str, str | bool] | None]: ...


def allotments(
    mask: NeuronMask | Mapping[str, NeuronMask],
    prompts: Sequence[str],
    seeds: Sequence[int],
    axes: Sequence[Axis] = (),
    shares: Sequence[Mapping[str, float]] = (),
) -> list[Any]:
    """What each image gets of a mask, or of several by name, as `allot_masks` takes it.

    Several masks are asked about together: each image is allotted one of the joint groups, "female" with "old" say. Two
    masks that are asked about one by one would allot by the same draw, and all that is female would be old.

    Args:
        mask: An allocating mask allots each image a group, from its prompt and seed alone; or masks by name.
        prompts: One for each image.
        seeds: One for each image.
        axes: Axes whose groups the gate looks for; empty opens the gate.
        shares: Of the groups, as `shares_of` takes them; uniform by default.

    Returns:
        For each image its group, True if the mask allots none, or None where the gate leaves it alone; of several masks
        a table from name to that.

    Raises:
        InputError: Not one seed for each prompt, or as `shares_of`.
    """
    if len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one of each for every image")
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    if isinstance(mask, NeuronMask):
        return _allotments(mask, shares_of(mask.groups, shares) if mask.allocates else None, rows, prompts, axes)
    kinds = {frozenset(each.groups): each.groups for each in mask.values() if each.allocates}
    joint = list(product(*kinds.values()))  # a single, empty one without any
    drawn = shares_of([JOINT.join(names) for names in joint], shares) if kinds else uniform(1)
    found: list[Any] = []
    for row, neutral in zip(rows, _neutral(prompts, axes), strict=True):
        names = joint[allotted_group(row, drawn)]
        own = {key: next((name for name in names if name in each.groups), True) for key, each in mask.items()}
        found.append(own if neutral else None)
    return found


class Treatment:
    """Damps by a mask within a `with` block; every batch is announced by `begin`.

    Args:
        target: A diffusers pipeline, a `Model`, or the denoiser itself.
        mask: What to damp. An allocating one allots each image a group, from its prompt and seed alone.
        axes: Axes whose groups the gate looks for: a prompt that names one is left alone. Empty opens the gate.
        strength: Scales the damping, 0 to 1.
        shares: Of the groups, as `shares_of` takes them; uniform by default.
        guided: As in `suppress`.
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
        guided: bool | None = None,
        force: bool = False,
    ) -> None:
        self.mask, self.axes = mask, list(axes)
        self.shares = shares_of(mask.groups, shares) if mask.allocates else None
        self.suppression = suppress(target, mask, strength, guided, force)

    def allotment(self, rows: "Sequence[Row]", prompts: Sequence[str] | None = None) -> list[str | bool | None]:
        """What each image gets: its group, True for a plain mask, or None where the gate leaves it alone.

        Args:
            rows: Samples with `prompt` and `seed`.
            prompts: What the images are conditioned on; the rows' own prompts by default.
        """
        texts = [row["prompt"] for row in rows] if prompts is None else prompts
        return _allotments(self.mask, self.shares, rows, texts, self.axes)

    def begin(self, rows: "Sequence[Row]", prompts: Sequence[str] | None = None) -> list[str | bool | None]:
        """Announce the images of the next batch; what each gets, see `allotment`."""
        allotted = self.allotment(rows, prompts)
        self.suppression.allot(allotted)
        return allotted

    def __enter__(self) -> Self:
        self.suppression.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.suppression.__exit__(kind, value, traceback)


def _allotments(
    mask: NeuronMask, shares: Tensor | None, rows: "Sequence[Row]", texts: Sequence[str], axes: Sequence[Axis]
) -> list[str | bool | None]:
    """The group goes by a row's own prompt and seed, the gate by the text that the image is conditioned on."""
    treated = _neutral(texts, axes)
    if shares is None:
        return [each or None for each in treated]
    groups = [mask.groups[allotted_group(row, shares)] for row in rows]
    return [group if own else None for group, own in zip(groups, treated, strict=True)]


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
    """Whether a prompt names no group, and is to be treated."""
    return not named_groups(prompt, axis)


def by_lean(leans: Tensor, bound: float) -> Tensor:
    """Which prompts look as if they named a group: (B,) bool.

    Those whose lean toward one and the same group is within `bound` of 1 at all the steps measured. A prompt without a
    finite lean does not look so.

    The lean knows no words, and takes a stereotype that is total for a wish: on the embedded model, where neutral
    prompts of a strongly tilted occupation lean to 1 by themselves, this alone would leave the worst cases untreated.

    Args:
        leans: (K, B), or (M, K, B) at M early steps.
        bound: Above 0.

    Raises:
        InputError: The bound is not above 0, or the leans are of another shape, or of no step.
    """
    if not bound > 0:
        raise InputError(f"bound {bound:g}: expected a number above 0, such as 0.1")
    if leans.ndim not in (2, 3) or 0 in leans.shape[:-1]:
        raise InputError(f"leans of shape {tuple(leans.shape)}: expected groups x prompts, or steps x groups x prompts")
    near = (leans - 1).abs() <= bound  # NaN is near nothing
    return (near if near.ndim == 3 else near[None]).all(0).any(0)
