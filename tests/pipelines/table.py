"""The table in docs/reference/pipelines.md, what each pipeline did: `python -m tests.pipelines.table` writes it.

A row is made from the tiny pipeline of its class, and a test compares each with what the page says.
"""

import sys
from pathlib import Path

from tests.pipelines.tiny import TINY, build

from stereoclinic.ddtd.conservation import check
from stereoclinic.ddtd.rules.composites import COMPOSITES
from stereoclinic.ddtd.rules.operations import tensors
from stereoclinic.errors import InputError, UncoveredOperation
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.learn import learnt_of
from stereoclinic.pipelines.model import Defaults, Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import load_prompts, with_seeds

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "pipelines.md"
BEGIN, END = "<!-- table: pipelines -->", "<!-- end of table -->"
HEAD = (
    "| pipeline | denoiser's calls in a step | kinds of site | composites | conservation error |",
    "| --- | --- | --- | --- | --- |",
)
CALLS = {
    ((True,),): "1, with the prompt",
    ((False, True),): "1: rows without, then with",
    ((True, False),): "1: rows with, then without",
    ((True,), (False,)): "2: with, then without",
    ((False,), (True,)): "2: without, then with",
}


def opened(name: str) -> Model:
    """The tiny pipeline of a name, with steps that suit it."""
    made = Model(build(name), name, call=TINY[name].call)
    made.defaults = Defaults(steps=TINY[name].steps, guidance=scale(name, made))
    return made


def scale(name: str, model: Model) -> float:
    """The guidance scale at which a pipeline guides, where it does."""
    given = TINY[name].guidance
    return model.defaults.guidance if given is None else given


def row(name: str, model: Model) -> str:
    """One pipeline's row."""
    guidance = model.defaults.guidance
    try:
        learnt = learnt_of(model, guidance)
    except InputError as error:
        return f"| {title(name, model)} | | | refused: {str(error).partition(': ')[2].partition(' (')[0]} | |"
    kept: list[dict[str, object]] = []
    walk = Walk(model, list(with_seeds(load_prompts("portraits", 2), 0, 1)), model.defaults.steps, guidance, last=1)
    walk.visit = lambda call: kept.append(call.arguments(None, slice(None)))
    walk.run()
    text = list(tensors([leaf for path, leaf in tree.leaves(kept[0], learnt.axes) if path in learnt.conditions]))
    missing, error = {}, ""
    for composite in COMPOSITES:
        try:
            found = check(model.network, lambda: learnt.flat(model.network(**kept[0])), composite, text=text)
        except (InputError, UncoveredOperation) as refusal:
            missing[composite] = str(refusal).partition(";")[0]
            continue
        if found.uncovered:
            missing[composite] = ", ".join(f"`{each.rpartition('.')[2]}`" for each in found.uncovered)
        if composite == "epsilon-cp" and not found.uncovered:
            error = f"{found.error:.0e}" if found.error > 1e-5 else "below 1e-5"
    kinds = ", ".join(dict.fromkeys(site.kind for site in find_sites(model.network)))
    calls = CALLS[tuple(call.blocks for call in learnt.calls)]
    said = "all" if not missing else f"all but {', '.join(missing)} ({next(iter(missing.values()))})"
    return f"| {title(name, model)} | {calls} | {kinds} | {said} | {error} |"


#: Entries that share a class with another.
SEVERAL = ("sd1", "sd2", "flux", "flux-schnell", "hunyuan-image", "hunyuan-image-distilled")


def title(name: str, model: Model) -> str:
    """The class, and which of several of one class."""
    kind = f"`{type(model.pipe).__name__}`"
    return f"{kind}, {name}" if name in SEVERAL else kind


def written(rows: list[str]) -> str:
    """The page with these rows in its table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2] or rest
    return "\n".join((f"{before}{BEGIN}", "", *HEAD, *rows, "", f"{END}{after}"))


if __name__ == "__main__":
    rows = []
    for number, name in enumerate(TINY, start=1):
        print(f"{number}/{len(TINY)} {name}", file=sys.stderr)
        rows.append(row(name, opened(name)))
    PAGE.write_text(written(rows))
