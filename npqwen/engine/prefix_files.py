"""The directory of a prefix cache: one file per page, for later runs and other processes to read.

A file is a valid safetensors file: `ids` is I32 (tokens,), `page` has the page's positions as `KVCache` holds them,
rounded up to whole tiles. A hybrid's `state.N` is the recurrent state after N of the page's tokens, F32 (layers,
elements of a layer's state). `__metadata__` has the format, its version, the key, these N and a CRC-32 of ids, page and
states. The name consists of the key of the tokens before the page, a hash of its first tokens, and its key; keys depend
on the fingerprints of model and adapter and on the cache's type. So a page of another model, version or text has
another name, and neither an index nor a lock is needed: files are created by atomic replacement and never modified.

The modification time is that of the last use. When the directory exceeds its limit, files are removed, the least
recently used first; times within a prefix decrease from page to page, so that its last pages are removed first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.atomic_file import new_file, remove_abandoned, writing
from npqwen.engine.cache_pages import page_part
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.prefix_page import MIN_PREFIX, Ids, PrefixPage, common_prefix, key_after, root_key
from npqwen.engine.snapshot import page_dtype
from npqwen.errors import OptionError, OutputError
from npqwen.format.files import fill, open_regular
from npqwen.format.safetensors import Header, HeaderError, make_header, read_header
from npqwen.kernels.cache_page import PAGE
from npqwen.wording import size

FORMAT, VERSION = "npqwen-prefix", "1"
DEFAULT_SIZE = 10 * 10**9
"""Bytes that a directory may take by default."""
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}-[0-9a-f]{32}\.safetensors", re.ASCII)
_OFFSETS = re.compile(r"[0-9]{1,3}(,[0-9]{1,3}){0,255}", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{8}", re.ASCII)
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)
"""Errors of the system that say nothing about a file."""


class _Damaged(Exception):
    """A file is not what its name says; the message is a clause with the reason."""


class _Found(NamedTuple):
    used: int
    name: str
    size: int


def check_directory(path: Path) -> None:
    """Make the directory if there is none; OutputError unless files can be written there."""
    with writing(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; a prefix cache is a directory")
        if not path.exists():
            path.mkdir(mode=0o700, parents=True)
        probe = path / f".writable.partial-{uuid.uuid4().hex[:12]}"
        probe.touch()
        probe.unlink()


def check_size(limit: int, page_bytes: int) -> None:
    """Raise OptionError unless `limit` bytes are enough for two pages of a model."""
    if limit < 2 * page_bytes:
        raise OptionError(
            f"a prefix cache of {size(limit)} is too small: {PAGE} tokens of this model take {size(page_bytes)}; "
            "give it at least twice as much"
        )


class PrefixFiles:
    """The pages of one model in a directory. Reading and writing may happen in several threads."""

    def __init__(self, directory: Path, limit: int, cache: KVCache, fingerprint: str) -> None:
        """limit: bytes that all files may take, those of other models included. cache: any cache of the model.

        Raises OutputError for a directory that cannot be written, OptionError for a limit below two pages.
        """
        check_directory(directory)
        check_size(limit, cache.page_bytes)
        self.directory = directory
        self.limit = limit
        self.page_bytes = cache.page_bytes
        """Bytes of a page in memory."""
        self._new_page = cache.new_page
        self._dtype = page_dtype(cache.kv)
        self._tile = cache.tile
        self._recurrent = None if cache.recurrent is None else cache.recurrent.shape
        self._new_state = cache.new_state
        self.root = root_key(FORMAT, VERSION, fingerprint, self._dtype, cache.page_shape)
        self._sample = cache.new_page()
        self._damaged: dict[str, str] = {}
        """Names of files that were removed, and why, since the last `take_damaged`."""
        self._unreadable: dict[str, str] = {}
        """Names of files that could not be read, and why, since the last `take_damaged`."""
        self._refused: set[str] = set()
        """Names of files that could not be read or removed."""
        remove_abandoned(directory)

    def read(self, parent: bytes, ids: Ids, depth: int) -> PrefixPage | None:
        """The page with these tokens; None without a usable file of it. Raises OutOfMemoryError if memory is too short.
        """
        return self._read(_name(parent, ids, key_after(parent, ids)), parent, depth)

    def read_longest(self, parent: bytes, ids: Ids, depth: int, least: int) -> PrefixPage | None:
        """The page after the tokens with the key `parent` that has the longest common prefix with `ids`.

        None if that is shorter than `least` or MIN_PREFIX tokens. Raises OutOfMemoryError if memory is too short.
        """
        start = _start(parent, ids)
        try:
            names = [name for name in os.listdir(self.directory) if name.startswith(start) and _NAME.fullmatch(name)]
        except OSError:
            return None
        lengths = {name: common_prefix(self._ids(name), ids) for name in names}
        for name in sorted(lengths, key=lambda name: -lengths[name]):
            if lengths[name] < max(least, MIN_PREFIX):
                return None
            page = self._read(name, parent, depth)
            if page is not None:
                return page
        return None

    def write(self, page: PrefixPage) -> None:
        """Write a page unless there is a file of it with all its states, and update its time of use.

        It is not written if the files used before it do not make enough room. Raises OutputError.
        """
        name = _name(page.parent, page.ids, page.key)
        path = self.directory / name
        used = page.used - 1000 * page.depth  # nanoseconds; file systems resolve 100 ns, or less
        if not path.exists() or page.is_outdated:
            part = page_part(page.array, len(page.ids), self._tile)
            # A page's owner may still append to it, so the checksum is computed from a copy.
            data = part if page.is_full else part.copy()
            flat = data.reshape(-1).view(np.uint8)
            ids = page.ids.astype("<i4")
            checksum = zlib.crc32(flat.data, zlib.crc32(ids.data))
            states = dict(sorted(page.states.items()))
            for state in states.values():
                checksum = zlib.crc32(state.data, checksum)
            header = self._header(len(ids), page.key, f"{checksum:08x}", list(states))
            needed = len(header) + ids.nbytes + flat.nbytes + sum(state.nbytes for state in states.values())
            if not self._make_room(needed, used):
                return
            with new_file(path, private=True, sync=False) as file:
                file.write(header)
                file.write(ids.data)
                file.write(flat.data)
                for state in states.values():
                    file.write(state.data)
            page.is_outdated = False
        with contextlib.suppress(OSError):
            os.utime(path, ns=(used, used))
        if page.replaces is not None:
            with contextlib.suppress(OSError):
                (self.directory / _name(page.parent, page.ids, page.replaces)).unlink()

    def take_damaged(self) -> str | None:
        """A line about the files found damaged or unreadable since the last call; None if there were none."""
        if not self._damaged:
            unreadable, self._unreadable = self._unreadable, {}
            for name, reason in unreadable.items():
                return f"cannot read {self.directory / name} of the prefix cache: {reason}"
            return None
        damaged, self._damaged = self._damaged, {}
        name, reason = next(iter(damaged.items()))
        if len(damaged) == 1:
            return f"removed a damaged file of the prefix cache: {self.directory / name}: {reason}"
        return f"removed {len(damaged)} damaged files of the prefix cache in {self.directory}; {name}: {reason}"

    def _read(self, name: str, parent: bytes, depth: int) -> PrefixPage | None:
        if name in self._refused:
            return None
        try:
            with open_regular(self.directory / name) as file:
                return self._checked(file, name, parent, depth)
        except _Damaged as error:
            self._drop(name, str(error))
            return None
        except OSError as error:
            self._refuse(name, error)
            return None

    def _checked(self, file: BinaryIO, name: str, parent: bytes, depth: int) -> PrefixPage:
        """A page from an open file. Raises _Damaged unless all of it matches its name and checksum."""
        header, ids = self._head(file)
        key = bytes.fromhex(header.metadata["key"])
        if name != _name(parent, ids, key_after(parent, ids)) or key != key_after(parent, ids):
            raise _Damaged("its tokens do not match its name")
        page = self._new_page()
        part = page_part(page, len(ids), self._tile)
        whole = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
        flat = whole.reshape(-1).view(np.uint8)
        if fill(file, whole) != flat.nbytes:
            raise _Damaged("it is truncated")
        checksum = zlib.crc32(flat.data, zlib.crc32(ids.astype("<i4").data))
        states: dict[int, NDArray[np.float32]] = {}
        for offset in self._offsets(header, len(ids)):
            states[offset] = state = self._new_state()
            if fill(file, state) != state.nbytes:
                raise _Damaged("it is truncated")
            checksum = zlib.crc32(state.data, checksum)
        if f"{checksum:08x}" != header.metadata["checksum"]:
            raise _Damaged("its checksum is wrong")
        if whole is not part:
            part[...] = whole
        stored = frozenset(states)
        return PrefixPage(parent, ids, page, depth, stored=len(ids), states=states, stored_states=stored)

    def _head(self, file: BinaryIO) -> tuple[Header, Ids]:
        """Header and ids of an open file, which is left at the page's first byte. Raises _Damaged."""
        try:
            header = read_header(file)
        except HeaderError as error:
            raise _Damaged(str(error)) from None
        metadata = header.metadata
        if metadata.get("format") != FORMAT:
            raise _Damaged("it is not a page of a prefix")
        if metadata.get("format_version") != VERSION:
            raise _Damaged("it has another format version")
        stored, key = header.tensors.get("ids"), metadata.get("key", "")
        if stored is None or len(stored.shape) != 1 or not MIN_PREFIX <= stored.shape[0] <= PAGE:
            raise _Damaged("its header is damaged")
        if not re.fullmatch(r"[0-9a-f]{32}", key) or not _CHECKSUM.fullmatch(metadata.get("checksum", "")):
            raise _Damaged("its header is damaged")
        count = stored.shape[0]
        # The number of tokens, the key, the checksum and the states' offsets determine the header.
        expected = self._header(count, bytes.fromhex(key), metadata["checksum"], self._offsets(header, count))
        file.seek(0)
        if file.read(len(expected)) != expected:
            raise _Damaged("its header is damaged")
        ids = np.empty(count, "<i4")
        if fill(file, ids) != ids.nbytes:
            raise _Damaged("it is truncated")
        return header, ids.astype(np.int32)

    def _ids(self, name: str) -> Ids:
        """The tokens of a file; empty if it cannot be used."""
        none = np.zeros(0, np.int32)
        if name in self._refused:
            return none
        try:
            with open_regular(self.directory / name) as file:
                return self._head(file)[1]
        except _Damaged as error:
            self._drop(name, str(error))
            return none
        except OSError as error:
            self._refuse(name, error)
            return none

    def _drop(self, name: str, reason: str) -> None:
        """Remove a file that cannot be used, and record why."""
        self._damaged[name] = reason
        try:
            (self.directory / name).unlink()
        except FileNotFoundError:
            pass
        except OSError:
            self._refused.add(name)

    def _refuse(self, name: str, error: OSError) -> None:
        """Leave a file alone that cannot be read, from now on unless it is gone or the reason is a passing one."""
        if not isinstance(error, FileNotFoundError) and error.errno not in _PASSING:
            self._unreadable[name] = error.strerror or str(error)
            self._refused.add(name)

    def _offsets(self, header: Header, count: int) -> list[int]:
        """The offsets of a file's states: after how many of the page's `count` tokens each is. Raises _Damaged."""
        text = header.metadata.get("states")
        if text is None:
            return []
        if self._recurrent is None or not _OFFSETS.fullmatch(text):
            raise _Damaged("its header is damaged")
        offsets = [int(offset) for offset in text.split(",")]
        if offsets != sorted(set(offsets)) or not 0 < offsets[0] <= offsets[-1] <= count:
            raise _Damaged("its header is damaged")
        return offsets

    def _header(self, count: int, key: bytes, checksum: str, offsets: Sequence[int]) -> bytes:
        """The file's first bytes, up to the data. offsets: of the states, in tokens of the page."""
        metadata = {"format": FORMAT, "format_version": VERSION, "key": key.hex(), "checksum": checksum}
        shape = page_part(self._sample, count, self._tile).shape
        tensors: list[tuple[str, str, tuple[int, ...]]] = [("ids", "I32", (count,)), ("page", self._dtype, shape)]
        if offsets:
            assert self._recurrent is not None
            metadata["states"] = ",".join(map(str, offsets))
            tensors += [(f"state.{n}", "F32", (self._recurrent.layers, self._recurrent.state)) for n in offsets]
        return make_header(tensors, metadata)

    def _make_room(self, needed: int, used: int) -> bool:
        """Remove files last used before `used` until `needed` more bytes fit; returns whether they do.

        The directory is listed each time, as other processes write to it, too: while several do, it may exceed the
        limit by one page per process.
        """
        newest_first = sorted(self._files(), reverse=True)
        total = sum(found.size for found in newest_first)
        while total + needed > self.limit:
            if not newest_first or newest_first[-1].used >= used:
                return False
            found = newest_first.pop()
            path = self.directory / found.name
            try:
                if path.stat().st_mtime_ns != found.used:
                    continue  # it was used meanwhile
                path.unlink()
            except FileNotFoundError:
                pass  # another process has removed it
            except OSError:
                continue  # another user's, or on Windows, open in another process
            total -= found.size
        return True

    def _files(self) -> Iterator[_Found]:
        """The page files in the directory."""
        with contextlib.suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        yield _Found(status.st_mtime_ns, entry.name, status.st_size)


def _start(parent: bytes, ids: Ids) -> str:
    """The common prefix of the file names of all pages after the same tokens whose first MIN_PREFIX ids equal those of
    `ids`."""
    first = hashlib.blake2b(ids[:MIN_PREFIX].astype("<i4").tobytes(), digest_size=4)
    return f"{parent.hex()}-{first.hexdigest()}-"


def _name(parent: bytes, ids: Ids, key: bytes) -> str:
    """The name of a page's file."""
    return f"{_start(parent, ids)}{key.hex()}.safetensors"
