"""Files of a checkpoint beside its weights and config.json, of which a conversion has a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SmallFile:
    """A file that the conversion of a checkpoint has too: of its tokenizer, say.

    name: its path in the directory, with "/". nbytes: of its content. read: gives the content; CheckpointError if it
    cannot be read.
    """

    name: str
    nbytes: int
    read: Callable[[], bytes]
