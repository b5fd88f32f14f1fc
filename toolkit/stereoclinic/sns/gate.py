"""The gate: a prompt that names a group of an axis asks for it, and is left as it is.

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

from torch import Tensor

from stereoclinic.axes import Axis
from stereoclinic.errors import InputError
from stereoclinic.words import any_of, folded


def named_groups(prompt: str, axis: Axis) -> tuple[str, ...]:
    """The groups that a prompt names, in the axis's order.

    Args:
        prompt: As it is given to the model.
        axis: Its words, `also` and `unless` are looked for.

    Examples:
        >>> from stereoclinic.axes import load_axis
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
