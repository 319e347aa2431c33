"""Checks of the cache: who may write to it, and whether the compiled kernels and the conversions are intact."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from npqwen.atomic_file import PARTIAL
from npqwen.errors import CheckpointError, FormatError
from npqwen.format.quantization import is_converted
from npqwen.hub.disk_space import free_bytes
from npqwen.hub.disk_usage import freed_bytes
from npqwen.hub.downloads import Download, damaged_downloads
from npqwen.hub.inventory import Conversion, conversions
from npqwen.hub.leftovers import leftovers
from npqwen.kernels.compiled import is_trusted, unusable_files, usable_directories
from npqwen.reports.finding import Finding
from npqwen.reports.verification import verify_structure
from npqwen.wording import shortened, size, unreadable

_LITTLE = 1 << 30
"""Bytes of free disk below which the smallest model does not fit."""


def check_downloads(found: list[Download]) -> Iterator[Finding]:
    """Problems of huggingface_hub's cache. found: the Qwen3 checkpoints in it."""
    for download in found:
        partial = [path for path in download.path.glob("blobs/*.incomplete") if path.is_file()]
        if partial:
            amount = size(sum(path.stat().st_size for path in partial))
            yield Finding.note(f"the download of {download.model} is incomplete ({amount})", "npqwen pull continues it")
    try:
        warnings = damaged_downloads()
    except OSError as error:
        yield Finding(f"downloads cannot be read: {error.filename}: {error.strerror}", "check who owns it")
        return
    for warning in warnings:
        problem = f"a download is damaged: {shortened(warning, 300)}"
        yield Finding.note(problem, "remove its directory; it is downloaded again when it is needed")


def check_cache(root: Path) -> Iterator[Finding]:
    """Problems of the cache directory `root`, which need not exist."""
    try:
        yield from _check_place(root)
        if root.is_dir():
            yield from _check_kernels()
            yield from _check_conversions([one for one in conversions(root) if one.stale is None])
            yield from _moved_aside(root)
            yield from _leftovers(root)
    except OSError as error:
        yield Finding(unreadable(error.filename or root, error), "check who owns it")


def _check_place(root: Path) -> Iterator[Finding]:
    existing = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not existing.is_dir():
        yield Finding(f"{existing} is not a directory", "name another place for the cache in NPQWEN_CACHE")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            f"nothing can be written to the cache, {root}: kernels are compiled anew by every command",
            "make it writable, or name another directory in NPQWEN_CACHE",
        )
    if root.is_dir() and _others_may_replace(root):
        yield Finding(
            f"{root} belongs to another user, or others may write to it, and could replace models and programs in it",
            f"chmod o-w {shlex.quote(str(root))}, or name another directory in NPQWEN_CACHE",
        )
    for folder in sorted([*root.glob("hub/*"), *root.glob("local/*")]):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            yield Finding(f"{folder} cannot be read", "check who owns it")
    free = free_bytes(root)
    if free < _LITTLE:
        yield Finding(
            f"only {size(free)} are free where the cache is, {root}",
            "npqwen cache prune, npqwen rm MODEL, or name a directory on another disk in NPQWEN_CACHE",
        )


def _others_may_replace(directory: Path) -> bool:
    """Whether a user other than this one and root owns it, or it is world-writable. Its group may write: on many
    systems it has only this user."""
    state = directory.stat()
    if sys.platform == "win32":
        return False
    return state.st_uid not in (os.geteuid(), 0) or bool(state.st_mode & stat.S_IWOTH)


def _check_kernels() -> Iterator[Finding]:
    for directory in usable_directories():
        if not directory.is_dir():
            continue
        if not is_trusted(directory):
            yield Finding(
                f"the kernels in {directory} are not used: it belongs to another user, or others may write to it",
                f"rm -r {shlex.quote(str(directory))}; they are compiled again",
            )
            continue
        for name, reason in unusable_files(directory).items():
            yield Finding(f"kernels: {directory / name} {reason}", "remove it; it is compiled again when it is needed")


def _check_conversions(found: list[Conversion]) -> Iterator[Finding]:
    unsigned = []
    for one in found:
        again = f"npqwen convert {shlex.quote(one.model)} --bits {one.bits or 4} --force"
        try:
            state = verify_structure(one.path)
        except (FormatError, CheckpointError) as error:
            yield Finding(str(error), again)
            continue
        for damage in state.damage:
            yield Finding(f"{one.model}, {one.bits} bits, in {one.path}: {damage}", again)
        if not state.damage and not state.has_checksums:
            unsigned.append(f"{one.model} ({one.bits} bits)")
    if unsigned:
        yield Finding.note(
            f"without checksums, since an earlier version of npqwen converted {'them' if len(unsigned) > 1 else 'it'}: "
            f"{', '.join(unsigned)}",
            "npqwen convert MODEL --bits N --force writes them, so that npqwen verify can find damage",
        )


def _moved_aside(root: Path) -> Iterator[Finding]:
    """Models that a killed conversion was to replace, and has moved aside."""
    for old in sorted([path for place in ("hub", "local") for path in root.glob(f"{place}/*/.*.{PARTIAL}-*/old")]):
        name = old.parent.name[1:].rpartition(f".{PARTIAL}-")[0]
        if is_converted(old) and not is_converted(old.parent.with_name(name)):
            yield Finding(
                f"a conversion that was killed has moved the earlier one to {old}",
                "the same npqwen convert puts it back and continues",
            )


def _leftovers(root: Path) -> Iterator[Finding]:
    found = leftovers(root)
    if found:
        reasons = dict.fromkeys(one.reason.rpartition(": ")[2] for one in found)
        yield Finding.note(
            f"{size(freed_bytes([one.path for one in found]))} of the cache can be freed: {'; '.join(reasons)}",
            "npqwen cache prune removes it, with --dry-run it only lists it",
        )
