"""What the commands share: options, consoles, exit codes, the configuration file."""

import errno
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console

from stereo_cli import ranks

P = ParamSpec("P")

FAILED, BAD_INPUT, INCOMPLETE, INTERRUPTED = 1, 2, 3, 130
#: What a disk says that is full, over its quota, or not to be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
#: Bytes of a --config, and lists in it: the time of the YAML parser grows with the square of nested ones.
MOST_CONFIG, MOST_LISTS = 2**16, 200


_claims = ExitStack()  # of the running command


def claim(place: Path) -> None:
    """Be the one run that writes somewhere until the command ends, however it ends; ranks of one job count as one.

    Args:
        place: What is written: a file in a folder that is there, or a folder, which is made.

    Raises:
        InputError: Another run writes there, or the folder cannot be made.
    """
    if is_rank_zero():
        from stereoclinic.files import sole_writer

        _claims.enter_context(sole_writer(place))


def is_rank_zero() -> bool:
    """False in the processes that Lightning, torchrun or SLURM started beside the first."""
    ranks = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def stdout() -> Console:
    """In a pipe or file, which have no width, tables get the 110 columns that they are laid out for."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(quiet=not is_rank_zero(), width=None if wide else 110, highlight=False)


def say(text: str) -> None:
    """A line on stdout; not wrapped, and file names in it are not read as markup."""
    if is_rank_zero():
        print(text)


def warn(text: str) -> None:
    """A line on stderr about something that stops nothing; from every rank, for each speaks of its own samples."""
    print(f"stereo: {_line(text)}", file=sys.stderr)


def _line(text: str) -> str:
    """Text in one line, without what a terminal would obey or could not show."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))


def stderr() -> Console:
    return Console(stderr=True, quiet=not is_rank_zero(), highlight=False)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the toolkit's errors into one line and the documented exit code."""

    @functools.wraps(command)
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
        except BrokenPipeError:  # stdout was closed, by `| head` say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except typer.Exit:
            raise
        except OSError as error:
            if error.errno not in _DISK:
                raise
            fail(
                f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room, or give another folder",
                BAD_INPUT,
            )
        except Exception as error:
            # Lightning's name for options that do not go together; importing it here would cost every command seconds.
            if (line := ranks.lost()) is not None:  # what the other ranks were waiting for went with it
                fail(line, INCOMPLETE)
            if type(error).__name__ != "MisconfigurationException":
                raise
            fail(str(error), BAD_INPUT)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)

    return run


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


def reader_folder(model: str, advice: str) -> Path:
    """The reader that a model brings.

    Raises:
        InputError: It brings none, and what to do about it.
    """
    from stereoclinic.denoisers import model_folder
    from stereoclinic.errors import InputError

    folder = model_folder(model)
    if folder is None or not (folder / "reader").is_dir():
        where = "of its own, as it is no folder here" if folder is None else f"in {folder / 'reader'}"
        raise InputError(f"model {model!r} has no reader {where}; {advice}")
    return folder / "reader"


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Options from a YAML file become defaults, so that a flag on the command line wins."""
    if path is None:
        return None
    import yaml

    from stereoclinic.errors import InputError
    from stereoclinic.reading import check_plain, read_text

    try:
        text = read_text(path, "--config", MOST_CONFIG)
        if text.count("[") + text.count("{") > MOST_LISTS:
            fail(f"--config {path}: more than {MOST_LISTS} lists, which no options are", BAD_INPUT)
        # A name for a part can stand for any number of copies of it.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            fail(f"--config {path}: an alias (*NAME), which options have no need of; write the value itself", BAD_INPUT)
        given = yaml.safe_load(text) or {}
        check_plain(given)
    except InputError as error:
        fail(str(error), BAD_INPUT)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        fail(f"--config {path}: {str(error)[:300]}", BAD_INPUT)
    if not isinstance(given, dict):
        fail(f"--config {path}: expected a mapping of options to values", BAD_INPUT)
    known: dict[str, Any] = {}
    for parameter in ctx.command.params:
        flags = [flag[2:] for flag in parameter.opts if flag.startswith("--")] or [parameter.name]
        known |= {flag.replace("-", "_"): parameter for flag in flags if flag not in ("config", "help")}
    options = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in known:
            there = ", ".join(sorted(flag.replace("_", "-") for flag in known))
            fail(f"--config {path}: no option {key}; there are {there}", BAD_INPUT)
        repeats = known[name].multiple or known[name].nargs == -1
        values = value if repeats and isinstance(value, list) else [value]
        if not all(isinstance(each, str | int | float | None) for each in values):
            fail(
                f"--config {path}: {key}: expected {'values' if repeats else 'one value'}, not {type(value).__name__}",
                BAD_INPUT,
            )
        options[known[name].name] = [value] if repeats and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **options}
    return path


def _whole_model(strategy: str) -> str:
    """Refuse before any work what a predict loop that draws would refuse after it."""
    if strategy.startswith("fsdp"):
        fail(
            f"--strategy {strategy}: only locate shares weights out; draw with ddp, and --dtype bfloat16 if need be",
            BAD_INPUT,
        )
    return strategy


Model = Annotated[
    str, typer.Option(help="`portraits`, a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub id.")
]
Dtype = Annotated[str, typer.Option(help="What the model's weights are loaded in: float32, bfloat16, float16.")]
Variant = Annotated[str | None, typer.Option(help="Of the model's weight files, such as fp16.", show_default=False)]
AxisName = Annotated[str, typer.Option("--axis", help="Axis of bias: gender, skin, age, or your own TOML file.")]
Prompts = Annotated[
    str,
    typer.Option(help="Neutral prompts: `portraits`, `winobias`, a .txt/.csv/.jsonl/.parquet file, or a hub data set."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts only.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps.", show_default="the model's own")]
Shares = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GROUP=SHARE,...",
        help="Allocating masks: how many images each group gets, such as female=0.5,male=0.5; once an axis.",
        show_default="the same for all",
    ),
]
Devices = Annotated[int, typer.Option(min=1, help="Devices, or processes on a CPU.")]
NumNodes = Annotated[int, typer.Option(min=1, help="Machines.")]
Strategy = Annotated[
    str, typer.Option(help="Lightning's strategy; auto is ddp on more than one device.", callback=_whole_model)
]
SharingStrategy = Annotated[
    str,
    typer.Option(
        help="auto, ddp: each device holds the whole model; auto is ddp on more than one. fsdp: each holds its share of"
        " the UNet's weights, and they are put together a block at a time: for a UNet that does not fit one device."
    ),
]
Accelerator = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
Precision = Annotated[str, typer.Option(help="Lightning's name: 32-true, bf16-mixed, ...")]
Force = Annotated[bool, typer.Option("--force", help="Accept files made for other weights of the same shapes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, and stop.")]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of options; flags on the command line win.", callback=read_config, is_eager=True),
]


def shares_from(given: list[str] | None) -> list[dict[str, float]]:
    """What --shares says: one mapping of group to share for each time it is given.

    Raises:
        InputError: It is not of the form GROUP=SHARE,GROUP=SHARE.
    """
    from stereoclinic.errors import InputError

    found = []
    for text in given or []:
        shares: dict[str, float] = {}
        for part in text.split(","):
            group, _, value = part.partition("=")
            try:
                share = float(value)
            except ValueError:
                raise InputError(f"--shares {text!r}: expected GROUP=SHARE, such as female=0.5,male=0.5") from None
            if group.strip() in shares:
                raise InputError(f"--shares {text!r}: {group.strip()} is given twice")
            shares[group.strip()] = share
        found.append(shares)
    return found


def print_json(data: Any) -> None:
    if is_rank_zero():
        print(json.dumps(data, indent=2))


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
