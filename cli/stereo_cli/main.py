"""`stereo`: the commands and what they are for. Nothing heavy is imported until a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import cleandoc
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from stereo_cli.apply import apply
from stereo_cli.bench import bench
from stereo_cli.command import Command, hide_types
from stereo_cli.compare import compare
from stereo_cli.diff import diff
from stereo_cli.doctor import doctor
from stereo_cli.export import export
from stereo_cli.inspect import inspect
from stereo_cli.locate import locate
from stereo_cli.mask import mask
from stereo_cli.plan import plan
from stereo_cli.reader import check
from stereoclinic.io.text import printable


@contextmanager
def _quoted_safely() -> Iterator[None]:
    """What is wrong with options is said by typer, in their own words."""
    try:
        yield
    except TyperException as error:
        error.message = printable(error.message)
        raise


class _Commands(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        hide_types(self.get_params(ctx), ctx)
        super().format_help(ctx, formatter)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _quoted_safely():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with _quoted_safely():
            return super().invoke(*args, **kwargs)


def paragraphs(text: str) -> str:
    """A docstring whose paragraphs are one line each, to be wrapped at the terminal's width; all but examples."""
    parts = cleandoc(text).split("\n\n")
    return "\n\n".join(
        part.replace("\b\n", "\b") if part.startswith("\b") else " ".join(part.split()) for part in parts
    )


app = typer.Typer(
    name="stereo",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=paragraphs(
        """Find where a stereotype lives inside a text-to-image diffusion model, damp it, and measure what that did.

    \b
    stereo locate                  find neurons, forecast bias
    stereo bench --mask gender.pt  the same seeds, compared
    stereo plan                    a damping for each group
    stereo bench --mask gender-allocated.pt
    stereo inspect gender.pt       what a file holds
    stereo mask RELEVANCE --mu 4 -o gentle.pt
    stereo diff gender.pt age.pt   what two have in common
    stereo apply "a photo of a doctor" --mask gender.pt
    stereo export one.pt -o gender.safetensors
    stereo compare A B             what differs in two benches
    stereo doctor --model MODEL    is this model supported
    stereo reader check clip FACES how often a reader is right

    The embedded model `portraits` is used unless --model names another text-to-image pipeline of diffusers.

    Exit codes: 0 done; 1 --fail-above exceeded; 2 bad input; 3 incomplete; 70 internal error; 130 interrupted."""
    ),
)


for command in (locate, plan, mask, inspect, diff, apply, export, bench, compare, doctor):
    app.command(cls=Command, help=paragraphs(command.__doc__ or ""))(command)

readers = typer.Typer(name="reader", cls=_Commands, no_args_is_help=True, help="Measure classifiers of images.")
readers.command(cls=Command, help=paragraphs(check.__doc__ or ""))(check)


@readers.callback()
def _reader() -> None:
    """With a callback, typer keeps the name of the one command."""


app.add_typer(readers, context_settings={"help_option_names": ["-h", "--help"]})


def main() -> None:
    app(prog_name="stereo")


if __name__ == "__main__":
    main()
