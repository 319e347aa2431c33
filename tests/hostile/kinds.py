"""Devices, named pipes, sockets, links and endless files in place of each file of a model."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

from hostile.case import Case, Place
from hostile.configs import command

_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "model.safetensors.index.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "README.md", "LICENSE", "additional_chat_templates/a.jinja", "added_tokens.json",
    "model-00001-of-00003.safetensors",
)  # fmt: skip


def kinds(random: Random, place: Place) -> Case:
    """One file replaced by something else."""
    base = random.choice(["dense-4", "mixture-4", "dense", "shards"])
    model = place.copy(base)
    name = random.choice(_FILES)
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    kind = random.choice(list(_KINDS))
    _KINDS[kind](path)
    return Case(f"{base}: {name} is {kind}", command(random, place, model, is_checkpoint="-" not in base))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(20 << 30)


def _sparse_header(path: Path) -> None:
    """A header as long as a header may be."""
    with open(path, "wb") as file:
        file.write((99_999_999).to_bytes(8, "little") + b"{")
        file.truncate(20 << 30)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


_KINDS: dict[str, Callable[[Path], object]] = {
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a link to /dev/random": lambda path: path.symlink_to("/dev/random"),
    "a link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
    "a link to /dev/tty": lambda path: path.symlink_to("/dev/tty"),
    "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to /proc/self/environ": lambda path: path.symlink_to("/proc/self/environ"),
    "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
    "a link to nothing": lambda path: path.symlink_to("missing"),
    "a link to itself": _loop,
    "a link to a directory": lambda path: path.symlink_to("."),
    "a link to its parent": lambda path: path.symlink_to(".."),
    "a named pipe": _fifo,
    "a socket": _socket,
    "a directory": lambda path: path.mkdir(),
    "20 GB of holes": _sparse,
    "20 GB with a long header": _sparse_header,
    "empty": lambda path: path.touch(),
    "not readable": _unreadable,
    "missing": lambda path: None,
}
