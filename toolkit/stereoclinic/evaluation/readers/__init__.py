"""Readers: classifiers that say which group of an axis an image shows.

A reader reads perceived presentation, not identity. There is one that ships with the embedded model (`portraits`), CLIP
asked in words (`clip`), image classifiers of the hub (`hugging_face`), several at once (`ensemble`), or a user's own.
`open_reader` opens them by name.
"""

from stereoclinic.evaluation.reader_kinds import KINDS
from stereoclinic.evaluation.readers.base import (
    KnownError,
    Reader,
    as_reader,
    can_read,
    fingerprint,
    group_columns,
    groups_seen,
    read_rows,
)
from stereoclinic.evaluation.readers.opening import open_reader
from stereoclinic.evaluation.readers.portraits import PortraitsNet, PortraitsReader

__all__ = [
    "KINDS",
    "KnownError",
    "PortraitsNet",
    "PortraitsReader",
    "Reader",
    "as_reader",
    "can_read",
    "fingerprint",
    "group_columns",
    "groups_seen",
    "open_reader",
    "read_rows",
]
