"""A denoiser whose weights are shared out over devices, for one that does not fit a single card: the strategy "fsdp".

    rank 0   [1/N of every weight]  \\
    rank 1   [1/N of every weight]   > a block is gathered, run, and freed; again on the way back
    ...

That is torch's FSDP2. Each rank has its own samples, as under "ddp", but all must run every block together: as many
samples each, in as many passes. Weights are gathered bit for bit, so the result is that of one device up to rounding:
they have another layout in memory, and gradients are summed in another order.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from stereoclinic.ddtd.rules.composites import get_composite
from stereoclinic.ddtd.rules.lora import find_adapted
from stereoclinic.errors import InputError
from stereoclinic.prompts.sets import Samples

SHARDED = "fsdp"
#: Without autocast, which keeps a copy of every weight for the backward pass (94 % of the portraits U-Net's).
PRECISIONS = ("32-true", "bf16-true", "16-true")


def check_sharded(network: nn.Module, samples: object, composite: str, precision: str | None, ranks: Any) -> None:
    """Refuse what shared-out weights do not allow.

    Raises:
        InputError: One device, a stream, autocast, or rules that recognise layers by their weights.
    """
    if not isinstance(ranks, int) or ranks < 2:
        raise InputError(f"strategy {SHARDED!r} shares the weights out over devices: give their number, 2 or more")
    if not isinstance(samples, Samples):
        raise InputError(
            f"strategy {SHARDED!r}: all devices need as many samples, and a stream does not say how many it has; read"
            " the prompts without --stream"
        )
    if precision not in (None, *PRECISIONS):
        raise InputError(
            f"strategy {SHARDED!r}: precision {precision!r} would keep a copy of the weights on every device, or is"
            f" not known to it; expected one of {', '.join(PRECISIONS)}"
        )
    chosen = get_composite(composite)
    if chosen.layers or (chosen.by_terms and any(find_adapted(network))):
        raise InputError(
            f"strategy {SHARDED!r}: composite {chosen.name!r} recognises layers by their weights, which are gathered"
            " for each pass; use one without rules for single layers (such as zplus-cp or gradient), and merge adapters"
            " first"
        )


def sharded(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of a denoiser of which this rank holds its share of the weights; the given one stays whole.

    The blocks that diffusers names in `_no_split_modules` are gathered one at a time.
    """
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    copied = copy.deepcopy(network, weights)
    blocks: Any = copied._no_split_modules
    for module in reversed(list(copied.modules())):  # blocks before those that they are parts of
        if module is copied or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    return copied


class Evened(Sequence[dict[str, Any]]):
    """Samples, then the first one again, with `number` None, until every rank gets as many."""

    def __init__(self, samples: Samples, ranks: int) -> None:
        self.samples, self.length = samples, -(-len(samples) // ranks) * ranks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        place = range(self.length)[index]
        return self.samples[place] if place < len(self.samples) else {**self.samples[0], "number": None}
