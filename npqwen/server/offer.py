"""A model on offer: what is known of it without loading it, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from npqwen.format.config import Config
from npqwen.format.quantization import Quantization

if TYPE_CHECKING:
    from npqwen.model import Model


@dataclass(frozen=True)
class Offer:
    """A converted directory that a server loads when a request needs it.

    name: what clients call it. path: the converted directory. load: maps it; any thread may call it.
    """

    name: str
    path: Path
    load: Callable[[], Model]

    @cached_property
    def config(self) -> Config:
        """The dimensions, from config.json."""
        return Config.from_directory(self.path)

    @cached_property
    def quantization(self) -> Quantization:
        """How the weights are stored."""
        return Quantization.from_directory(self.path)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    @cached_property
    def modified(self) -> float:
        """When it was converted, in seconds since the epoch."""
        return (self.path / "config.json").stat().st_mtime
