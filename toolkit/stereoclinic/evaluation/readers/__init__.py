"""Readers: classifiers that look at a picture and say which group of an axis they see.

A reader reads perceived presentation, not identity. One file each: the one that ships with the embedded model
(`portraits`), CLIP asked in words (`clip`), image classifiers of the hub (`hugging_face`), several at once
(`ensemble`), or a user's own. `open_reader` finds them by name.
"""

from stereoclinic.evaluation.readers.base import (
    KnownError,
    Reader,
    can_read,
    features_of,
    fingerprint,
    group_columns,
    groups_seen,
    known_errors,
    limits,
    read_rows,
)
from stereoclinic.evaluation.readers.opening import KINDS, open_reader
from stereoclinic.evaluation.readers.portraits import PortraitsNet, PortraitsReader

__all__ = [
    "KINDS",
    "KnownError",
    "PortraitsNet",
    "PortraitsReader",
    "Reader",
    "can_read",
    "features_of",
    "fingerprint",
    "group_columns",
    "groups_seen",
    "known_errors",
    "limits",
    "open_reader",
    "read_rows",
]
