"""Digests of the data that a conversion wrote, in the file `NAME` of the model's directory (quant/FORMAT.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from npqwen.errors import CheckpointError
from npqwen.format.config import read_json
from npqwen.format.files import open_regular

NAME = "npqwen-checksums.json"
ALGORITHM = "sha256"
"""The algorithm of all digests. Processors have instructions for it: 2 GB/s on x86-64; the hub uses it, too."""

_VERSION = 1
_PIECE = 1 << 20


class Digest:
    """An incremental digest of bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.new(ALGORITHM, usedforsecurity=False)

    def update(self, data: memoryview | bytes) -> None:
        self._hash.update(data)

    def text(self) -> str:
        """In hexadecimal digits."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Checksums:
    """The digests of a converted model."""

    tensors: Mapping[str, str] = field(default_factory=dict)
    """Digests of every tensor's bytes, by its name."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Digests of config.json (see `config_digest`) and of the small files that programs read, by their paths."""

    def as_bytes(self) -> bytes:
        """The content of the file."""
        content = {"checksums_version": _VERSION, "algorithm": ALGORITHM}
        return (json.dumps(content | {"tensors": self.tensors, "files": self.files}, indent=2) + "\n").encode()

    @classmethod
    def of(cls, directory: Path) -> Checksums | None:
        """The checksums of a converted model; None if it has none, or those of another version.

        Raises CheckpointError for a damaged file.
        """
        path = directory / NAME
        if not path.exists():
            return None
        raw = read_json(path)
        tensors, files = raw.get("tensors"), raw.get("files")
        if raw.get("checksums_version") != _VERSION or raw.get("algorithm") != ALGORITHM:
            return None
        if not _is_digests(tensors) or not _is_digests(files):
            raise CheckpointError(f"{path} is damaged")
        return cls(tensors, files)


def _is_digests(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def config_digest(config: Mapping[str, Any]) -> str:
    """The digest of config.json: of its JSON with sorted keys and without spaces, nor
    `quantization_config.evaluation`, which is stored later."""
    entry = {key: value for key, value in config["quantization_config"].items() if key != "evaluation"}
    text = json.dumps({**config, "quantization_config": entry}, sort_keys=True, separators=(",", ":"))
    return bytes_digest(text.encode())


def bytes_digest(data: bytes) -> str:
    """The digest of a small file's content."""
    digest = Digest()
    digest.update(data)
    return digest.text()


def digest_of_range(path: Path, offset: int, nbytes: int) -> str:
    """The digest of a range of a file's bytes; OSError if it cannot be read, EOFError if it is too short."""
    digest = Digest()
    for piece in pieces(path, offset, nbytes):
        digest.update(piece)
    return digest.text()


def pieces(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    """A range of a file's bytes, piece by piece, each valid until the next; raises what `digest_of_range` raises."""
    buffer = memoryview(bytearray(min(_PIECE, nbytes)))
    with open_regular(path) as file:
        file.seek(offset)
        while nbytes:
            got = file.readinto(buffer[: min(len(buffer), nbytes)])  # type: ignore[attr-defined]
            if not got:
                raise EOFError
            yield buffer[:got]
            nbytes -= got
