"""Whether a batch is guided, which tells where its conditional samples lie."""

import copy
import weakref
from typing import Any, Self

from torch import nn

from stereoclinic.errors import InputError

#: Pipelines whose batch is not "unconditional half, conditional half", by part of their class's name.
OTHER_BATCHES = ("PAG", "Pix2Pix", "LEdits", "Semantic")


class Guidance:
    """Whether a batch is guided: as was said, or as the pipeline says at every call.

    A pipeline is not copied along: a deep copy of a pipeline asks itself, and a copied UNet has no one to ask until it
    is bound to a pipeline.

    Args:
        target: A pipeline, or a bare denoiser.
        told: What was said, if anything.
        keep: Keep the pipeline alive.
    """

    def __init__(self, target: Any, told: bool | None = None, keep: bool = True) -> None:
        self.told = told
        self.bare = isinstance(target, nn.Module)
        self._pipe = None if self.bare else weakref.ref(target)
        self._kept = target if keep and not self.bare else None

    def now(self) -> bool:
        """Raises InputError if there is no one to ask, or no answer."""
        if self.told is not None:
            return self.told
        if self.bare:
            return False
        pipe = self._pipe() if self._pipe is not None else None
        if pipe is None:
            raise InputError(
                "this UNet's pipeline is gone, so nobody says whether a batch is guided; call enable_masks(pipe) with "
                "the pipeline that it is in"
            )
        name = type(pipe).__name__
        if any(part in name for part in OTHER_BATCHES):
            raise InputError(
                f"a {name} does not run an unconditional and a conditional half; use a mask of branch 'both' and "
                "treat all samples alike"
            )
        try:
            return bool(pipe.do_classifier_free_guidance)
        except AttributeError as error:
            raise InputError(
                f"this {name} does not say whether it is guiding; pass guided=True or guided=False"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        pipe = self._pipe() if self._pipe is not None else None
        if pipe is not None:
            copied = memo.get(id(pipe))
            twin._pipe = None if copied is None else weakref.ref(copied)
        return twin
