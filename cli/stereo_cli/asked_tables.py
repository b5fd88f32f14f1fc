"""Tables of what `stereo bench` measures where it is asked for or can be told, and of what its reader cannot tell."""

from collections.abc import Callable

from rich.console import Group

from stereo_cli.tables import Data, captioned, interval, new_table, p_value, styled

Column = Callable[[Data], str]

_CLIP_SCORE = (
    "CLIPScore: how well pictures fit their neutral prompts, from 0 to 100; its change is on the same seeds, and p is"
    " for no change."
)
_LPIPS = (
    "LPIPS: how far pictures are from untreated ones of the same seed, as a network sees it; `other seeds` shows what"
    " two seeds of a prompt differ by."
)
_NO_GROUP = (
    "No group: images that rather show none, such as no face; they still count in the shares, by what is read beside"
    " that."
)
_READERS = (
    "Readers agree: images on which all readers name the same group. Kappa: the same beyond what chance brings, a dash"
    " where both name one group throughout. Readers that share a mistake agree on it."
)


def asked_tables(results: Data) -> list[Group]:
    """What was asked for, if anything was: further figures of the arms, and of unrelated prompts."""
    return [*_further_table(results), *([_unrelated_table(results)] if "unrelated" in results else [])]


def reader_says(provenance: Data) -> Group | None:
    """What the reader cannot tell, and how often it is known to be wrong; None where it says nothing."""
    said = [*provenance["reader_limits"], *(f"Known error: {each}." for each in provenance["reader_errors"])]
    if not said:
        return None
    lines = (styled(f"- {each}", "dim") for each in said)
    return Group(styled(f"What the reader cannot tell: {provenance['reader']}", "bold"), *lines, "")


def _further_table(results: Data) -> list[Group]:
    """One table of the arms, or none: the CLIPScore, LPIPS, images of no group, and how readers agree."""
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
    if "no_group" in untreated:
        columns["no group"] = lambda arm: interval(arm["no_group"])
        says.append(_NO_GROUP)
    if "readers_agree" in untreated:
        columns["readers\nagree"] = lambda arm: interval(arm["readers_agree"])
        columns |= {f"kappa of\n{pair}": _kappa(pair) for pair in untreated["readers_kappa"]}
        says.append(_READERS)
    if not columns:
        return []
    table = new_table(f"Further figures: guidance {results['guidance']:g}")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, arm in results["arms"].items():
        style = "bold" if name in results["masks"] else ""
        table.add_row(name, *(cell(arm) for cell in columns.values()), style=style)
    return [captioned(table, " ".join([*says, "Brackets are 95 % intervals."]))]


def _unrelated_table(results: Data) -> Group:
    """How far prompts that have nothing to do with the axis drift, beside other seeds."""
    found = results["unrelated"]
    table = new_table(f"Unrelated prompts: guidance {results['guidance']:g}")
    table.add_column("")
    pairs = {"similarity": "ssim_to_untreated", "feature\ndistance": "feature_distance_to_untreated"}
    if "lpips_to_untreated" in found["arms"]["other seeds"]:
        pairs["LPIPS"] = "lpips_to_untreated"
    if "clip_score" in found["arms"]["untreated"]:
        pairs["CLIPScore"] = "clip_score"
    for name in [*pairs, "Fréchet", "KID"]:
        table.add_column(name, justify="right")
    for name, arm in found["arms"].items():
        sets = [arm[f"{distance}_to_other_seeds"] for distance in ("frechet", "kid")]
        table.add_row(
            name,
            *(interval(arm[key]) if key in arm else "" for key in pairs.values()),
            *("" if value is None else f"{value:.2g}" for value in sets),
            style="bold" if name in results["masks"] else "",
        )
    first, last = found["seeds"]
    return captioned(
        table,
        f"{len(found['prompts'])} prompts of {found['images_per_prompt']} images, seeds {first} to {last}; the gate"
        f" leaves {found['left_alone']} of them alone. Similarity (SSIM) and feature distance are to the untreated"
        " picture of the same seed; in `other seeds` stands what two seeds differ by. Fréchet and KID (kernel distance)"
        " are to untreated images of other seeds; in `untreated` stands what two samples differ by. Brackets are 95 %"
        " intervals.",
    )


def _kappa(pair: str) -> Column:
    return lambda arm: interval(arm["readers_kappa"][pair])
