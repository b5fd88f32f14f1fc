"""`stereo`: the commands and what they are for. Nothing heavy is imported until a command runs."""

from inspect import cleandoc

import typer

from stereo_cli.apply import apply
from stereo_cli.bench import bench
from stereo_cli.compare import compare
from stereo_cli.diff import diff
from stereo_cli.doctor import doctor
from stereo_cli.inspect import inspect
from stereo_cli.locate import locate
from stereo_cli.mask import mask
from stereo_cli.plan import plan

app = typer.Typer(
    name="stereo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Find where a stereotype lives inside a text-to-image diffusion model, damp it, and measure what that did.

    \b
    stereo locate                    find the neurons; forecast the bias
    stereo bench --mask gender.pt    the same seeds with and without, compared
    stereo plan                      a damping for each group, and seeds allot
    stereo bench --mask gender-allocated.pt
    stereo inspect gender.pt         what a file holds, by layer and timestep
    stereo mask gender.relevance.safetensors --mu 4 -o gentle.pt
    stereo diff gender.pt gentle.pt  what two masks have in common
    stereo apply "a photo of a doctor" --mask gender.pt
    stereo compare A B               which figures of two benches differ
    stereo doctor --model MODEL      is this model supported

    The embedded model `portraits` is used unless --model names another text-to-image pipeline of diffusers.

    Exit codes: 0 done; 1 --fail-above exceeded; 2 bad input; 3 incomplete; 70 internal error; 130 interrupted.""",
)


def paragraphs(text: str) -> str:
    """A docstring whose paragraphs are one line each, to be wrapped at the terminal's width; all but examples."""
    parts = cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else " ".join(part.split()) for part in parts)


for command in (locate, plan, mask, inspect, diff, apply, bench, compare, doctor):
    app.command(help=paragraphs(command.__doc__ or ""))(command)


def main() -> None:
    app(prog_name="stereo")


if __name__ == "__main__":
    main()
