"""Files of a checkpoint besides its weights and config.json, which a conversion copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SmallFile:
    """A file that a conversion copies, such as the tokenizer's.

    name: its path in the directory, with "/". nbytes: of its content. read: returns the content; CheckpointError if it
    cannot be read.
    """

    name: str
    nbytes: int
    read: Callable[[], bytes]
