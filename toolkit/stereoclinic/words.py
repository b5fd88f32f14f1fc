"""Words in a text, found whatever their case, Unicode form or script.

Texts are compared *folded*: decomposed (NFKD, which also makes plain letters of full-width ones), without case and
without signs that are not seen. Words are whole words where a script writes spaces between them. In Chinese, Japanese,
Thai and others that write none, a word within running text counts.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

#: Scripts that write no spaces between words, as a part of a character class: Thai, Lao, Tibetan, Burmese, Khmer, Tai,
#: Kana, Han.
SPACELESS = (
    "\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
#: Signs that belong to the letter before them: accents, vowel signs.
_MARKS = "".join(sign for sign in map(chr, range(0x300, 0x3100)) if unicodedata.category(sign).startswith("M"))
_SPACED_MARKS = "".join(sign for sign in _MARKS if not re.match(f"[{SPACELESS}]", sign))
_LETTER = rf"[^\W_{SPACELESS}]"
_BEFORE, _AFTER = rf"(?<!{_LETTER})(?<![{_SPACED_MARKS}])", rf"(?!{_LETTER})"

#: Space, hyphens or nothing between the words of a phrase: "dark-skinned", "dark skinned", "darkskinned".
_GAP = r"[\s_\-\u2010]"


def folded(text: str) -> tuple[str, Sequence[int]]:
    """A text as it is compared, and where each character of that, and its end, stands in the text."""
    if text.isascii():
        return text.casefold(), range(len(text) + 1)
    found, places = list[str](), list[int]()
    for letter in re.finditer(f"(?s).[{_MARKS}]*", text):
        parts = unicodedata.normalize("NFKD", letter[0].replace("\u2019", "'"))
        parts = unicodedata.normalize("NFKD", parts.casefold())
        parts = "".join(part for part in parts if unicodedata.category(part) != "Cf")
        found.append(parts)
        places += [letter.start()] * len(parts)
    return "".join(found), [*places, len(text)]


@lru_cache(maxsize=256)
def any_of(phrases: tuple[str, ...], loose: bool = False) -> re.Pattern[str]:
    """What finds any of these phrases in a folded text.

    Args:
        phrases: Words, or several words with spaces between them.
        loose: Also with other gaps between a phrase's words, with an s of plural or possessive, and with a number
            before it ("2girls").
    """
    gap, split = (f"{_GAP}*", f"{_GAP}+") if loose else (r"\s+", r"\s+")
    count, plural = (r"\d*", "(?:'?s|')?") if loose else ("", "")
    edged: dict[tuple[str, str], list[str]] = {}
    for phrase, _ in map(folded, phrases):
        if words := [re.escape(word) for word in re.split(split, phrase) if word]:
            first = "" if re.match(rf"\W*[{SPACELESS}]", phrase) else _BEFORE + count
            last = "" if re.search(rf"[{SPACELESS}]\W*$", phrase) else _AFTER
            edged.setdefault((first, last), []).append(gap.join(words))
    found = [f"{first}(?:{'|'.join(each)}){plural}(?![{_MARKS}]){last}" for (first, last), each in edged.items()]
    return re.compile("|".join(found) or "(?!)")
