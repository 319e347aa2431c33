"""A hostile case: files in a scratch directory, and a command line that meets them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SECONDS = 2.0
"""CPU time that a command may take in any case but those that say so; a slower machine takes as much longer."""
GROWTH = 200_000_000
"""Bytes by which the process may grow beyond what it takes before the command."""


class Case(NamedTuple):
    """What a generator makes: a command to run on the files that it has written to its `Place`."""

    label: str
    """What is hostile about it."""
    args: list[str]
    """Arguments of `npqwen`."""
    stdin: bytes = b""
    call: Callable[[], object] | None = None
    """Called in place of the command, for what no command reads; the exceptions of npqwen count as its errors."""
    seconds: float = SECONDS
    """CPU time that it may take."""
    growth: int = GROWTH
    """Bytes by which the process may grow."""
    panics: bool = False
    """Whether the tokenizers library may write on stderr that it panics, before it raises an exception."""
    environment: Mapping[str, str] = {}
    statuses: tuple[int, ...] = (0, 2)
    """Exit statuses that are right."""


class Place:
    """The scratch directory of one case, and the models that hostile ones are made of."""

    def __init__(self, directory: Path, bases: Path) -> None:
        self.directory = directory
        self.bases = bases

    def copy(self, base: str, name: str = "model") -> Path:
        """A directory with the files of a base (see bases.py), as links: use `write` to replace one."""
        target = self.directory / name
        target.mkdir()
        for file in (self.bases / base).iterdir():
            os.link(file, target / file.name)
        return target

    def cache(self) -> dict[str, str]:
        """The environment in which the user's cache is a directory of this case's own."""
        return {"NPQWEN_CACHE": str(self.directory / "cache")}


Generator = Callable[[Random, Place], Case]
"""Writes one case's files, drawn at random; the same state of the generator of random numbers gives the same case."""


def write(path: Path, content: bytes | str) -> None:
    """Replace a file, which may be a link to a base's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Replace a JSON file by what `change` makes of its value, in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write(path, json.dumps(value))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes after it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: object, data: bytes) -> None:
    """Replace a safetensors file. header: bytes, or a JSON value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    write(path, struct.pack("<Q", len(text)) + text + data)


def flip_bits(raw: bytes, random: Random, most: int = 10) -> bytes:
    """The bytes with 1 to `most` bits flipped."""
    changed = bytearray(raw)
    for _ in range(random.randint(1, most) if raw else 0):
        changed[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    return bytes(changed)


def damage(raw: bytes, random: Random) -> tuple[str, bytes]:
    """Some bytes damaged as disks, networks and editors do it: how, and the result."""
    at = random.randrange(len(raw) + 1)
    kinds: dict[str, Callable[[], bytes]] = {
        "bits flipped": lambda: flip_bits(raw, random),
        "truncated": lambda: raw[:at],
        "empty": lambda: b"",
        "zeros": lambda: raw[:at] + bytes(len(raw) - at),
        "doubled": lambda: raw + raw,
        "bytes appended": lambda: raw + random.randbytes(random.choice([1, 7, 64, 5000])),
        "a hole": lambda: raw[:at] + raw[at + random.choice([1, 8, 100]) :],
        "noise": lambda: random.randbytes(random.choice([1, 8, 100, 5000])),
        "a byte order mark": lambda: b"\xef\xbb\xbf" + raw,
    }
    kind = random.choice(list(kinds))
    return kind, kinds[kind]()
