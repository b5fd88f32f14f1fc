"""What the commands share: consoles, errors and exit codes, devices."""

import errno
import functools
import io
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from stereo_cli import ranks
from stereo_cli.call import call_words
from stereoclinic.io.text import printable

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.sns.mask import NeuronMask

P = ParamSpec("P")

FAILED, BAD_INPUT, INCOMPLETE, FAULT, INTERRUPTED = 1, 2, 3, 70, 130
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)  # of what was given for a file and cannot be one
#: What a disk says that is full, over its quota, or not to be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


_claims = ExitStack()  # of the running command


def claim(*places: Path) -> None:
    """Be the one run that writes somewhere until the command ends, however it ends; ranks of one job count as one.

    Every file and folder that a command writes is claimed, those too whose names it makes from another's.

    Args:
        places: What is written: files in a folder that is there, or in one that is made, or folders.

    Raises:
        InputError: Another run writes there, or a folder cannot be made.
    """
    if is_rank_zero():
        from stereoclinic.io.files import sole_writer

        for place in places:
            for line in _claims.enter_context(sole_writer(place)):
                note(line)


def is_rank_zero() -> bool:
    """False in the processes that Lightning, torchrun or SLURM started beside the first."""
    ranks = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


class PlainConsole(Console):
    """Lays out plain texts as they were written: in a name, nothing is markup, and nothing is obeyed by a terminal.

    What is to have a style is a `Text`, made of `printable` text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every plain text that is printed or measured comes through here."""
        return super().render_str(printable(text), **options)


def stdout() -> PlainConsole:
    """In a pipe or file, which have no width, tables get the 110 columns that they are laid out for."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PlainConsole(quiet=not is_rank_zero(), width=None if wide else 110)


def say(text: str) -> None:
    """A line on stdout, not wrapped."""
    if is_rank_zero():
        print(printable(text))


def warn(text: str) -> None:
    """A line on stderr about something that stops nothing; from every rank, for each speaks of its own samples."""
    print(f"stereo: {_line(text)}", file=sys.stderr)


def note(text: str) -> None:
    """A line on stderr, from the first rank alone, about what the results may depend on."""
    if is_rank_zero():
        print(f"note: {_line(text)}", file=sys.stderr)


def _line(text: str) -> str:
    """Text in one line; other libraries break theirs."""
    return printable(" ".join(filter(None, map(str.strip, text.split("\n")))))


def stderr() -> PlainConsole:
    return PlainConsole(stderr=True, quiet=not is_rank_zero())


class _Lasting:
    """A stream that may be closed, by `| head` say, while the command goes on to its own exit code."""

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):  # not every terminal and pipe can show every sign
            stream.reconfigure(errors="replace")
        self._stream = stream
        #: What else stopped it, such as a full disk: what was printed is not all there.
        self.fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.fault = self.fault or error
            # What is left in its buffer would fail again when Python ends, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """A closed stdout or stderr stops nothing; a stdout that could not take all that was printed is told at the end."""
    lasting = [_Lasting(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(cast(TextIO, lasting[0])), redirect_stderr(cast(TextIO, lasting[1])):
        try:
            yield
        finally:
            for each in lasting:
                each.flush()
        if (fault := lasting[0].fault) is not None:
            fail(f"stdout cannot be written ({fault.strerror}); make room, or send it elsewhere", BAD_INPUT)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the toolkit's errors into one line and the documented exit code."""

    @functools.wraps(command)
    @_lasting_streams()
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _be_quiet()
        from stereoclinic.errors import Incomplete, InputError, UncoveredOperation

        ranks.watch(is_rank_zero(), INCOMPLETE)
        try:
            with _claims:
                command(*args, **kwargs)
        except (InputError, UncoveredOperation) as error:
            fail(str(error), BAD_INPUT)
        except Incomplete as error:
            fail(str(error), INCOMPLETE)
        except typer.Exit:
            raise
        except OSError as error:
            if error.errno in _NAMES:
                fail(f"{str(error.filename)[:60]}...: {error.strerror}; give a file, a folder or a name", BAD_INPUT)
            if error.errno not in _DISK:
                _fault()
            fail(
                f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room, or give another folder",
                BAD_INPUT,
            )
        except Exception as error:
            # Lightning's name for options that do not go together; importing it here would cost every command seconds.
            if (line := ranks.lost()) is not None:  # what the other ranks were waiting for went with it
                fail(line, INCOMPLETE)
            if type(error).__name__ != "MisconfigurationException":
                _fault()
            fail(str(error), BAD_INPUT)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)

    return run


def _fault() -> NoReturn:
    """An internal error, with its traceback; its exit code is not that of --fail-above."""
    print(*map(printable, traceback.format_exc().rstrip("\n").split("\n")), sep="\n", file=sys.stderr)
    fail("internal error; please report it with the traceback above", FAULT)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    # plain print: rich would wrap the line and read brackets in a user's file name as markup
    print(f"stereo: {_line(message)}", file=sys.stderr)
    raise typer.Exit(code)


def _be_quiet() -> None:
    """Libraries tell users about their own insides at start-up; none of that is about this run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|diffusers)\b.*")


def hush_lightning() -> None:
    """Call after Lightning was imported: its import sets the level of its loggers."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def strategy_for(strategy: str, ranks: int) -> str:
    """Lightning's strategy: where none is asked for, ddp between several ranks."""
    return "ddp" if strategy == "auto" and ranks > 1 else strategy


@contextmanager
def threads_for(device: str, ranks: int) -> Iterator[None]:
    """One thread a rank where several share a CPU: they slow each other down badly otherwise."""
    import torch

    threads = torch.get_num_threads()
    if device == "cpu" and ranks > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def own_axis(mask: "NeuronMask") -> "Axis | None":
    """The axis that a mask was made for; None if it does not say.

    Raises:
        InputError: It is of several axes, or of one that does not ship.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.prompts.axes import made_for, shipped_axis

    name, words = mask.metadata.get("axis"), mask.metadata.get("words")
    if name is None:
        return None
    own = list(dict.fromkeys(str(each.get("axis")) for each in mask.origins))
    if len(own) > 1:
        raise InputError(f"the mask is of several axes; say which is meant: --axis {' or --axis '.join(own)}")
    if shipped_axis(own[0], words) is None:
        raise InputError(f"the mask was made for axis {name!r}, which does not ship; give its file: --axis {name}.toml")
    return made_for({**mask.metadata, "axis": own[0]})


def neutral_prompts(source: str, limit: int | None) -> "Dataset":
    """What --prompts names: as `load_prompts`, and `protocol:NAME` what masks for a published protocol are made on."""
    from stereoclinic.prompts.sets import load_prompts

    kind, _, name = source.partition(":")
    if kind != "protocol":
        return load_prompts(source, limit)
    from stereoclinic.evaluation.protocols import load_protocol

    held_out = load_protocol(name).calibration()
    return held_out.take(min(limit or len(held_out), len(held_out)))


def reader_folder(model: str, advice: str) -> Path:
    """The reader that a model brings.

    Raises:
        InputError: It brings none, and what to do about it.
    """
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines import model_folder

    folder = model_folder(model)
    if folder is None or not (folder / "reader").is_dir():
        where = "of its own, as it is no folder here" if folder is None else f"in {folder / 'reader'}"
        raise InputError(f"model {model!r} has no reader {where}; {advice}")
    return folder / "reader"


def print_json(data: Any) -> None:
    from stereoclinic.io.files import plain

    if is_rank_zero():
        print(json.dumps(plain(data), indent=2, allow_nan=False))


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def device_of(accelerator: str, float64: bool = False) -> str:
    """The device that a command runs on, by torch's name.

    Args:
        accelerator: As given; "auto" takes the best that is there.
        float64: The command adds up in double precision, which Apple's GPUs do not have.

    Raises:
        InputError: No such accelerator, it is not there, or it will not do.
    """
    import torch

    from stereoclinic.errors import InputError

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator not in ACCELERATORS:
        raise InputError(f"--accelerator {accelerator!r}: expected one of {', '.join(ACCELERATORS)}")
    if float64:
        if accelerator == "mps":
            raise InputError("--accelerator mps: relevance is summed in float64, which mps does not have; give cpu")
        del there["mps"]
    if accelerator == "auto":
        return next(name for name, found in there.items() if found)
    device = "cuda" if accelerator == "gpu" else accelerator
    if not there[device]:
        found = ", ".join(name for name in there if there[name])
        raise InputError(f"--accelerator {accelerator}: torch finds none here; there is {found}")
    return device


def place_of(device: str, strategy: str = "auto") -> str:
    """Where a rank opens its model: on its own device, or on the CPU where the weights are to be shared out."""
    if device != "cuda" or strategy.startswith("fsdp"):
        return "cpu" if strategy.startswith("fsdp") else device
    import torch

    number = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return f"cuda:{number % torch.cuda.device_count()}"


def patterns_of(made: Mapping[str, Any]) -> list[str]:
    """The --sites that a file was made with.

    Raises:
        InputError: They are no list of texts.
    """
    from stereoclinic.errors import InputError

    found = made.get("patterns", [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InputError(f"the file was made with the sites {found!r}, which are no list of texts; make it again")
    return found


#: So few steps are all measured.
FEW = 8


def every_of(steps: int) -> int:
    """Which steps `stereo locate` measures by default: every second one, or all of few."""
    return 1 if steps <= FEW else 2


def unguided(model: "Model", steps: int | None) -> float:
    """The guidance scale to locate at by default: none, but the model's own where no prediction without prompt is made.

    There the scale is an argument of the denoiser, or nothing at all; other than its own it was not trained for.
    """
    from stereoclinic.pipelines.learn import learnt_of

    own = model.defaults.guidance
    return 1.0 if learnt_of(model, own, steps).guides else own


def note_differences(name: str, mask: "NeuronMask", model: "Model") -> None:
    """Say that a mask was made for other weights, or with other call options, than it is used with."""
    from stereoclinic.sns.compat import has_other_weights

    if has_other_weights(mask, model.network):
        note(f"mask {name} was made for other weights than those of {model.name}")
    call = model.call
    for made in (each.get("call") for each in mask.origins):
        if isinstance(made, dict) and made != call:
            spelt = [" ".join(call_words(each)) or "none" for each in (made, call)]
            note(f"mask {name} was made with other call options ({spelt[0]}) than are used now ({spelt[1]})")
            return


#: Options of choosing -> the --select that they belong to.
_OF = {"--mu": "plan", "--overshoot": "plan", "--at-most": "plan", "--top": "top-k", "--z": "top-k"}


def check_method(method: str, given: list[str]) -> None:
    """Raises InputError for an option of another way of choosing, which would change nothing."""
    from stereoclinic.errors import InputError

    if wrong := [name for name in given if _OF.get(name, method) != method]:
        raise InputError(f"{wrong[0]} belongs to --select {_OF[wrong[0]]}, and this is {method}; leave one of them")


#: What `stereo bench` takes where it is not told.
_BENCH = {"model": "portraits", "dtype": "float32", "prompts": "portraits"}


def words_of(call: Mapping[str, Any], **given: str | float | None) -> list[str]:
    """Options of the next command that are not as it has them by default."""
    told = {name: value for name, value in given.items() if value not in (None, _BENCH.get(name))}
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    return words + [word for each in call_words(call) for word in ("--call", each)]


def say_next(mask: Path, call: Mapping[str, Any], **given: str | float | None) -> None:
    """Say the command that judges a mask, with those options that are not as `stereo bench` has them by default."""
    say(f"next: {shlex.join(['stereo', 'bench', '--mask', str(mask), *words_of(call, **given)])}")


def opened_as(made: Mapping[str, Any], dtype: str, variant: str | None) -> tuple[str, str | None]:
    """The dtype and the variant that a file's model was opened with, as far as they are not given."""
    from stereoclinic.pipelines.opening import DTYPES

    own, of = made.get("dtype"), made.get("variant")
    if dtype == _BENCH["dtype"] and own in DTYPES:
        dtype = str(own)
    return dtype, of if variant is None and isinstance(of, str) else variant


def check_distinct(paths: list[Path], option: str = "") -> None:
    """Raises InputError for a file that is given twice: a mask would damp twice."""
    from stereoclinic.errors import InputError

    for i, path in enumerate(paths):
        if path.resolve() in [each.resolve() for each in paths[:i]]:
            raise InputError(f"{option} {path} is given twice".strip())


def check_target(path: Path, option: str, endings: tuple[str, ...]) -> None:
    """Refuse, before any work is done, a file that could not be written after it.

    Raises:
        InputError: Another ending, a folder, or in a folder that is not there or not writable.
    """
    from stereoclinic.errors import InputError

    if path.suffix.lower() not in endings:
        raise InputError(f"{option} {path}: expected a file name ending in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"{option} {path}: a folder; give a file name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: {path.parent} is no folder that can be written to; make it first")
