"""How neurons are chosen from relevance: the settings that `locate` and `stereo mask` share."""

from typing import TYPE_CHECKING, Any

from stereoclinic.calls.settings import CHOOSING, Settings, option
from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from stereoclinic.sns.select import Selection

#: Settings of choosing -> the way of choosing that they belong to.
_OF = {"mu": "plan", "overshoot": "plan", "at_most": "plan", "top": "top-k", "z": "top-k"}


class ChoosingSettings(Settings):
    """How neurons are chosen from relevance, see `sns.select.Selection`."""

    select: str = option(
        "plan", "Way to choose: plan (least squares, partial damping) or top-k (silence the most relevant neurons).",
        CHOOSING, advanced=True,
    )  # fmt: skip
    mu: float = option(
        1.0, "With --select plan: price of moving the prediction off the axis, 0 or more (tested: 0.3 to 3); a"
        " higher price damps less.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    overshoot: float = option(
        0.0, "With --select plan: remove this fraction more than the measured lean, such as 0.25.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    until: float | None = option(
        None, "Damp only from noise (timestep about 1000) down to this timestep; 0 damps at all steps.",
        CHOOSING, ge=0, advanced=True, default_text="600",
    )  # fmt: skip
    branch: str | None = option(
        None, "Halves of the guidance batch to damp: both, or conditional (with the prompt).",
        CHOOSING, advanced=True, default_text="both",
    )  # fmt: skip
    top: float = option(
        0.01, "With --select top-k: number of neurons; below 1, a fraction of them.", CHOOSING, ge=0, advanced=True
    )
    mask_root: str = option(
        "zero", "Value to damp toward: zero, balanced (mean over the group prompts), or a group's name (its mean).",
        CHOOSING, advanced=True,
    )  # fmt: skip

    def selection(self, **more: Any) -> "Selection":
        """As `choose` takes it.

        Raises:
            InputError: A name is not known, or a setting belongs to the other way of choosing.
        """
        from stereoclinic.sns.select import Selection

        names = ("select", "mu", "overshoot", "until", "branch", "top")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        selection = Selection(**given, root=self.mask_root, **more)
        for name in sorted(self.model_fields_set):
            if _OF.get(name, self.select) != self.select:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{flag} needs --select {_OF[name]}, but --select is {self.select}; leave out one of them"
                )
        return selection
