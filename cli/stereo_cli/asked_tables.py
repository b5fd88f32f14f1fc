"""Tables of what `stereo bench` measures only where it is asked for."""

from collections.abc import Callable

from rich.console import Group
from rich.markup import escape

from stereo_cli.tables import Data, captioned, interval, new_table, p_value

Column = Callable[[Data], str]

_CLIP_SCORE = (
    "CLIPScore: how well pictures fit their neutral prompts, from 0 to 100; its change is on the same seeds, and p is"
    " for no change."
)
_LPIPS = (
    "LPIPS: how far pictures are from untreated ones of the same seed, as a network sees it; `other seeds` shows what"
    " two seeds of a prompt differ by."
)
_READERS = (
    "Readers agree: images on which all readers name the same group. Kappa: the same beyond what chance brings, a dash"
    " where both name one group throughout. Readers that share a mistake agree on it."
)


def asked_tables(results: Data) -> list[Group]:
    """One table of the arms, or none: the CLIPScore, LPIPS, and the agreement of several readers."""
    untreated = results["arms"]["untreated"]
    columns: dict[str, Column] = {}
    says = []
    if "clip_score" in untreated:
        columns |= {
            "CLIPScore": lambda arm: interval(arm["clip_score"], digits=1),
            "change": lambda arm: interval(arm["clip_score_change"], True) if "clip_score_change" in arm else "",
            "p": lambda arm: p_value(arm["clip_score_change"]["p_value"]) if "clip_score_change" in arm else "",
        }
        says.append(_CLIP_SCORE)
    if "lpips_to_untreated" in results["arms"]["other seeds"]:
        columns["LPIPS"] = lambda arm: interval(arm["lpips_to_untreated"]) if "lpips_to_untreated" in arm else ""
        says.append(_LPIPS)
    if "readers_agree" in untreated:
        columns["readers\nagree"] = lambda arm: interval(arm["readers_agree"])
        columns |= {f"kappa of\n{pair}": _kappa(pair) for pair in untreated["readers_kappa"]}
        says.append(_READERS)
    if not columns:
        return []
    table = new_table(f"Asked for: guidance {results['guidance']:g}")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(escape(name), justify="right")
    for name, arm in results["arms"].items():
        style = "bold" if name in results["masks"] else ""
        table.add_row(escape(name), *(cell(arm) for cell in columns.values()), style=style)
    return [captioned(table, " ".join([*says, "Brackets are 95 % intervals."]))]


def _kappa(pair: str) -> Column:
    return lambda arm: interval(arm["readers_kappa"][pair])
