"""Text from files, prompts and options, made safe to show: a terminal obeys some of the signs that it is sent."""

#: Zero-width joiners: without them many words of Persian and Hindi, and some emoji, would be others.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""The text with every sign that is not printable as its Python escape, such as `\x1b`, `\u202e` or `\n`.

    Args:
        text: Whatever somebody wrote.

    Returns:
        A text of one line that no terminal obeys, and that cannot change the order of the signs round it.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in _JOINERS else escaped(sign) for sign in text)


def escaped(sign: str) -> str:
    """A sign as Python would write it in ASCII."""
    return sign.encode("unicode_escape").decode()
