"""Text that is safe to show, and words found in a text whatever their case, Unicode form or script.

Texts are compared *folded*: decomposed (NFKD), without case and invisible characters, with one space for any white
space. Words are whole words where a script writes spaces. In Chinese, Japanese, Thai and others without spaces, a word
within running text counts.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

#: Zero-width joiners: without them many words of Persian and Hindi, and some emoji, would be others.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""The text in one line, with every unprintable character as its Python escape: `\x1b`, `\u202e`, `\n`.

    A terminal would obey some of them, or write what follows in another order.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in _JOINERS else escaped(sign) for sign in text)


def escaped(sign: str) -> str:
    """A sign as Python would write it in ASCII."""
    return sign.encode("unicode_escape").decode()


_SPLITS = re.compile(r"(?<![a-z])(train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?![a-z])")


def slug(text: str) -> str:
    """Text as part of a file name on any system.

    A word that names the split of a data set gets an s: `datasets` would read a folder of such images as that split
    alone. So it is at most 60 long: 48 letters can hold twelve such words.
    """
    return _SPLITS.sub(r"\1s", re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48]) or "x"


def markdown(text: str, most: int = 500) -> str:
    """Text of a stranger in one line of Markdown, which shows it as it is: no markup, HTML, image or link."""
    text = printable(text)[:most]
    text = re.sub(r"([\\`*_\[\]<>#|~&!:@$])", r"\\\1", text)
    return re.sub(
        r"(?i)(\bwww)(?=\.)|(:)(?=//)", "\\g<0>\u2060", text
    )  # a word joiner: some readers link bare addresses


def is_own_card(path: Path) -> bool:
    """Whether a README.md was written here: its header has the tag `stereoclinic`."""
    with path.open("rb") as file:
        head = file.read(4096).decode("utf-8", "replace")
    return re.match(r"---\r?\n(?:[^-\n].*\n|- .*\n)*- stereoclinic\r?\n", head) is not None


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
_CLUSTER = re.compile(rf"\s+|(?s:.)[{_MARKS}]*")
_STARTS_SPACELESS, _ENDS_SPACELESS = re.compile(rf"\W*[{SPACELESS}]"), re.compile(rf"[{SPACELESS}]\W*$")
_STARTS, _ENDS, _ENDS_LETTER = re.compile(_BEFORE), re.compile(_AFTER), re.compile(f"(?![{_MARKS}])")

#: Space, hyphens or nothing between the words of a phrase: "dark-skinned", "dark skinned", "darkskinned".
_GAP = r"[\s_\-\u2010]"


def folded(text: str) -> tuple[str, Sequence[int]]:
    """The folded text, and the place in the text of each of its characters and of its end."""
    if text.isascii() and text.split() == text.split(" "):
        return text.casefold(), range(len(text) + 1)
    found, places = list[str](), list[int]()
    for letter in _CLUSTER.finditer(text):
        parts = " " if letter[0].isspace() else unicodedata.normalize("NFKD", letter[0].replace("\u2019", "'"))
        parts = unicodedata.normalize("NFKD", parts.casefold())
        parts = "".join(part for part in parts if unicodedata.category(part) != "Cf")
        found.append(parts)
        places += [letter.start()] * len(parts)
    return "".join(found), [*places, len(text)]


def whole_word(phrase: str, text: str) -> tuple[int, int] | None:
    """The first place of a phrase in a folded text, as whole words; None if it is not there."""
    phrase = folded(phrase)[0].strip()
    starts, ends = _STARTS_SPACELESS.match(phrase), _ENDS_SPACELESS.search(phrase)
    start = text.find(phrase) if phrase else -1
    while start >= 0:
        end = start + len(phrase)
        if (
            (starts or _STARTS.match(text, start))
            and (ends or _ENDS.match(text, end))
            and _ENDS_LETTER.match(text, end)
        ):
            return start, end
        start = text.find(phrase, start + 1)
    return None


@lru_cache(maxsize=64)
def any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds any of these phrases in a folded text, as whole words.

    It also allows other gaps between words, a plural or possessive s, and a number before them ("2girls").
    """
    edged: dict[tuple[str, str], list[str]] = {}
    for phrase, _ in map(folded, phrases):
        if words := [re.escape(word) for word in re.split(f"{_GAP}+", phrase) if word]:
            first = "" if _STARTS_SPACELESS.match(phrase) else rf"{_BEFORE}\d*"
            last = "" if _ENDS_SPACELESS.search(phrase) else _AFTER
            edged.setdefault((first, last), []).append(f"{_GAP}*".join(words))
    found = [f"{first}(?:{'|'.join(each)})(?:'?s|')?(?![{_MARKS}]){last}" for (first, last), each in edged.items()]
    return re.compile("|".join(found) or "(?!)")
