"""`stereo diff`: what two masks, or two relevance files, have in common."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stereo_cli import terminal
from stereo_cli.command import Json, command

if TYPE_CHECKING:
    from stereoclinic.pipelines.sites import Site


@command
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A mask or relevance file, .pt or .safetensors.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another file of the same kind.")],
    shown: Json,
) -> None:
    """Say what two masks, or two relevance files, have in common, and what differs in how they were made.

    By kind of layer and by timestep: how much each damps, how far they damp the same neurons (overlap), and how similar
    the damping is (rank correlation, cosine), each with the value that two unrelated files show by chance.

    \b
    stereo diff gender.pt age.pt
        do two axes live in the same neurons?
    stereo diff seed-0.pt seed-100.pt
        would other seeds have found the same?
    """
    from stereo_cli.diff_tables import diff_tables
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.errors import InputError
    from stereoclinic.io.tensors import kind_of
    from stereoclinic.report.anatomy import KINDS, places
    from stereoclinic.sns.diff import compare
    from stereoclinic.sns.mask import NeuronMask

    loaded: list[NeuronMask | Relevance] = []
    for path in (a, b):
        kind = kind_of(path)
        if kind not in ("mask", "relevance"):
            raise InputError(f"{path} is a {kind} file; expected a mask or relevance")
        loaded.append(NeuronMask.load(path) if kind == "mask" else Relevance.load(path))
    if isinstance(loaded[0], NeuronMask) != isinstance(loaded[1], NeuronMask):
        first, second = ("a mask" if isinstance(file, NeuronMask) else "relevance" for file in loaded)
        raise InputError(f"{a} is {first} and {b} is {second}; give two masks, or two relevance files")

    known = places(dict.fromkeys(site for file in loaded for site in file.sites))

    def kind_name(site: "Site") -> str:
        return KINDS[known[site].kind]

    found = compare(loaded[0], loaded[1], kind_name)
    if shown.as_json:
        terminal.print_json({"files": {"a": str(a), "b": str(b)}, **found})
        return
    terminal.say(f"A: {a}")
    terminal.say(f"B: {b}")
    terminal.say("")
    for table in diff_tables(found):
        terminal.stdout().print(table)
