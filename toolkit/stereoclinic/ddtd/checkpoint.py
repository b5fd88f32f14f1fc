"""What a run has measured so far: an interrupted run continues, on any number of devices.

    FOLDER/<attempt>-<rank>.safetensors      one rank's sums of one attempt, and which samples are in them

Sums are additive, so a new attempt leaves earlier files as they are and writes its own. A file is written whole or not
at all, between batches; what is lost is what a rank measured since it last wrote.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.ddtd.relevance import BY_LABEL, STATES, placed
from stereoclinic.errors import InputError
from stereoclinic.io.files import check_same
from stereoclinic.io.tensors import load_tensors, save_tensors

KIND, VERSION = "relevance shard", 2


@dataclass(frozen=True)
class Checkpoint:
    """What earlier attempts measured: numbers of samples, their labels, how many were dropped, files of sums."""

    done: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    dropped: int = 0
    files: tuple[Path, ...] = ()

    def sums(self, labels: list[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Name -> float64 sum over files, with a row for each of the labels; empty without a file.

        Args:
            labels: The run's; those of the files are among them.
            shapes: Of the run's sums, whatever their number of labels.

        Raises:
            InputError: A file's sums are of another shape, or it has other labels.
        """
        total: dict[str, Tensor] = {}
        for path in self.files:
            tensors, about = load_tensors(path, KIND, VERSION)
            if strange := [label for label in about["labels"] if label not in labels]:
                raise InputError(
                    f"{path}: label {strange[0]!r} does not belong to this run; remove {path.parent} and run again"
                )
            places = [labels.index(label) for label in about["labels"]]
            for name in STATES:
                by_label = name in BY_LABEL
                expected = (len(places), *shapes[name][1:]) if by_label else shapes[name]
                if tuple(tensors[name].shape) != expected or tensors[name].dtype != torch.float64:
                    raise InputError(f"{path}: {name} does not belong to this run; remove {path.parent} and run again")
                value = placed(tensors[name], places, len(labels)) if by_label else tensors[name]
                total[name] = total[name] + value if name in total else value
        return total


class Shards:
    """A folder of what a run has measured.

    Args:
        folder: Made when something is written.
        configuration: Plain data: everything that sums depend on, but for how samples were spread over devices.
        interval: Least seconds between two writes of a rank; where writing is slow, 20 times as long as that.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any], interval: float = 30.0) -> None:
        self.folder, self.configuration, self.interval = folder, configuration, interval
        self.attempt, self._next = secrets.token_hex(4), time.monotonic() + interval

    def kept(self) -> Checkpoint:
        """What is in the folder.

        Raises:
            InputError: It was measured in another configuration (says what differs), or a file is damaged.
        """
        files = tuple(sorted(self.folder.glob("*.safetensors"))) if self.folder.is_dir() else ()
        found = [self._read(path) for path in files]
        done = [number for numbers, _, _ in found for number in numbers]
        if len(set(done)) < len(done):
            raise InputError(f"{self.folder} holds a sample twice; remove it and run again")
        labels = dict.fromkeys(label for _, labels, _ in found for label in labels)
        return Checkpoint(done, list(labels), sum(dropped for *_, dropped in found), files)

    def _read(self, path: Path) -> tuple[list[int], list[str], int]:
        """Samples, labels and number of dropped samples of a file."""
        tensors, about = load_tensors(path, KIND, VERSION)
        if missing := [name for name in (*STATES, "done") if name not in tensors]:
            raise InputError(f"{path} lacks {missing[0]}; remove {self.folder} and run again")
        check_same(self.folder, about.get("configuration"), self.configuration)
        done, dropped, labels = tensors["done"], about.get("dropped"), about.get("labels")
        last = self.configuration.get("samples", 2**63)  # a stream's run does not know how many there are
        whole = done.ndim == 1 and done.dtype == torch.int64 and all(0 <= number < last for number in done.tolist())
        if not whole or not isinstance(dropped, int) or not 0 <= dropped <= len(done):
            raise InputError(f"{path} counts samples that do not exist; remove {self.folder} and run again")
        if not isinstance(labels, list) or {type(label) for label in labels} != {str} or len(set(labels)) < len(labels):
            raise InputError(f"{path} has labels that are not distinct texts; remove {self.folder} and run again")
        return done.tolist(), labels, dropped

    def write(
        self,
        rank: int,
        sums: dict[str, Tensor],
        done: Sequence[int],
        labels: list[str],
        dropped: int,
        last: bool = False,
    ) -> None:
        """Keep what a rank has measured, if it is time or the last of it.

        Args:
            rank: The rank.
            sums: See `relevance.RelevanceSums`; rows beyond the labels are left out.
            done: Numbers of the samples in them.
            labels: Of the rows.
            dropped: Number of dropped samples.
            last: Write now.

        Raises:
            InputError: It cannot be written there.
        """
        began = time.monotonic()
        if not done or (not last and began < self._next):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be made ({error.strerror}); choose another folder") from error
        about = {"configuration": self.configuration, "labels": labels, "dropped": dropped}
        rows = {name: sums[name][: len(labels)] for name in BY_LABEL if name in sums}
        tensors = {**sums, **rows, "done": torch.tensor(done, dtype=torch.int64)}
        save_tensors(self.folder / f"{self.attempt}-{rank}.safetensors", KIND, VERSION, tensors, about)
        ended = time.monotonic()
        self._next = ended + max(self.interval, 20 * (ended - began))
