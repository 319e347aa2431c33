"""Compiled kernels kept on disk, so that a machine compiles them once.

Numba's own cache does not notice a change in a function that the cached one calls. So the directory is named after
everything that machine code depends on: the kernels' sources, the versions that compiled them, the instruction set, the
processor and the size of memory pages. Its files are pickles and machine code, that is, programs: only those that no
other user could have written are read, and only undamaged ones. Processes that need the same function at the same time
compile it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import mmap
import os
import pickle
import platform
import stat
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import llvmlite
import numba
from numba.core import caching
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from npqwen.cache_directory import cache_directory
from npqwen.errors import KernelCacheWarning, user_stacklevel
from npqwen.format.files import open_regular
from npqwen.kernels.compile_events import raising_interrupts
from npqwen.kernels.compile_lock import CompileLock

_SOURCES = (
    "simd",
    "kernels",
    "format/encodings.py",
    "engine/draft_input.py",
    "engine/forward.py",
    "engine/records.py",
    "engine/steps.py",
    "reports/bandwidth.py",
)
"""The sources of all compiled code, and of the constants in it."""
_LOCK = ".lock"


def _digest_of_sources() -> bytes:
    digest = hashlib.sha256()
    here = Path(__file__).parents[1]
    for source in _SOURCES:
        for path in sorted((here / source).glob("*.py")) if (here / source).is_dir() else [here / source]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


_DIGEST = _digest_of_sources()
"""Computed on import: an upgrade may change the sources before the first kernel is compiled."""


@cache
def kernel_directory() -> Path:
    """The directory of kernels compiled from these sources and versions for this processor. It may not exist yet."""
    from npqwen.simd.isa import ISA  # importing it chooses one; the converter needs none

    return _directory_of(ISA.name)


def usable_directories() -> list[Path]:
    """`kernel_directory()` for each instruction set that this processor has, whichever is chosen."""
    from npqwen.simd.isa import available

    return [_directory_of(isa.name) for isa in available()]


def _directory_of(isa: str) -> Path:
    digest = hashlib.sha256(_DIGEST)
    codegen = cpu_target.target_context.codegen().magic_tuple()
    versions = numba.__version__, llvmlite.__version__, platform.python_version()
    for part in (*versions, isa, codegen, mmap.PAGESIZE):
        digest.update(repr(part).encode())
    return cache_directory() / "kernels" / f"{isa}-{digest.hexdigest()[:20]}"


def _is_private(status: os.stat_result) -> bool:
    """Whether only this user or the system's administrator could have written a file or directory."""
    if sys.platform == "win32":  # directories of a user's profile are private there
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _is_usable(directory: Path) -> bool:
    """Whether kernels may be read from a directory and written to it; warns if others could have written there."""
    try:
        if _is_private(directory.stat()):
            return True
    except FileNotFoundError:
        return True
    except OSError:
        _warn_of_unwritable(directory)
        return False
    warnings.warn(
        f"{directory} belongs to another user or others may write to it: kernels are compiled anew and not kept; "
        "remove it, or name another directory in NPQWEN_CACHE",
        KernelCacheWarning,
        stacklevel=user_stacklevel(),
    )
    return False


@cache
def _warn_of_unwritable(directory: Path) -> None:
    """Warn, once in a process, that kernels cannot be stored in their directory."""
    warnings.warn(
        f"{directory} cannot be written: kernels are compiled at every start, which takes about a minute; name a "
        "directory that can be written in NPQWEN_CACHE",
        KernelCacheWarning,
        stacklevel=user_stacklevel(),
    )


def is_writable() -> bool:
    """Whether compiled kernels can be stored in the kernel directory, which exists, for other processes."""
    directory = kernel_directory()
    return directory.is_dir() and _is_usable(directory) and os.access(directory, os.W_OK)


class _Files(caching.IndexDataCacheFile):
    """The files of one function's cache: each is a digest of its name and body, then the body, a pickle.

    Truncated, altered and swapped files count as missing: if unpickled, they could crash or compute something else.
    """

    private = False
    """Whether files that other users could have written count as missing, too."""

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def load(self, key: Any) -> Any:
        # The index may name a file that another process has overwritten since.
        found, data = super().load(key) or (None, None)
        return data if found == key else None

    def _load_index(self) -> dict[Any, str]:
        body = self._read(self._index_name)
        stamp, names = pickle.loads(body) if body is not None else (None, {})
        return names if stamp == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_name, self._dump(((self._version, self._source_stamp), overloads)))

    def _load_data(self, name: str) -> Any:
        body = self._read(name)
        return None if body is None else pickle.loads(body)

    def _save_data(self, name: str, data: Any) -> None:
        self._write(name, self._dump(data))

    def _read(self, name: str) -> bytes | None:
        try:
            with open_regular(Path(self._cache_path, name)) as file:
                if self.private and not _is_private(os.fstat(file.fileno())):
                    return None
                content = file.readall()  # type: ignore[attr-defined]  # unbuffered
        except OSError:
            return None
        return _body(name, content)

    def _write(self, name: str, body: bytes) -> None:
        with _replacing(Path(self._cache_path, name)) as file:
            file.write(_digest(name, body) + body)


def _digest(name: str, body: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((name.encode(), body))).digest()


def _body(name: str, content: bytes) -> bytes | None:
    """The body of a file, after its digest; None if the file is damaged or has another file's name."""
    size = hashlib.sha256().digest_size
    return content[size:] if content[:size] == _digest(name, content[size:]) else None


def unusable_files(directory: Path) -> dict[str, str]:
    """The files of a kernel directory that count as missing, by their names, and why, as a clause. OSError if the
    directory cannot be read."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == _LOCK:
            continue
        try:
            if not _is_private(path.stat()):
                found[path.name] = "belongs to another user, or others may write to it"
            elif _body(path.name, path.read_bytes()) is None:
                found[path.name] = "is an interrupted write" if ".tmp." in path.name else "is damaged"
        except OSError as error:
            found[path.name] = f"cannot be read: {error.strerror}"
    return found


def is_trusted(directory: Path) -> bool:
    """Whether nobody but this user and the administrator can have written to a directory. OSError if there is none."""
    return _is_private(directory.stat())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file, private to this user, that atomically replaces `path` once it is complete."""
    partial = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex[:16]}")
    try:
        with open(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "wb"
        ) as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


class CodeCache(caching.FunctionCache):
    """One function's machine code, where Numba keeps it.

    If an entry is damaged or the directory is not writable, the function is compiled again.
    """

    _cache_file: _Files

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # Numba refreshes the whole context here, which takes as long as loading all kernels. Only compiling needs
            # that, and does it itself; code that is loaded needs the symbols of the runtime.
            rtsys.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception:  # whatever unpickling raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()


class _Locator(caching._CacheLocator):
    """Keeps every function in the kernel directory."""

    def get_cache_path(self) -> str:
        return str(kernel_directory())

    def ensure_cache_path(self) -> None:
        kernel_directory().mkdir(mode=0o700, parents=True, exist_ok=True)

    def get_source_stamp(self) -> str:
        return kernel_directory().name

    def get_disambiguator(self) -> str:
        return "0"


class _Entries(caching.CompileResultCacheImpl):
    def __init__(self, function: Any) -> None:
        # Numba's own constructor uses another directory if NUMBA_CACHE_LOCATOR_CLASSES is set: only ours is named after
        # everything that the code depends on.
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator()
        name = f"{Path(inspect.getfile(function)).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))


class KernelCache(CodeCache):
    """A kernel's machine code, in the kernel directory.

    Missing code is locked until it is stored, or until `close`.
    """

    _impl_class = _Entries

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file.private = True
        self._lock: CompileLock | None = None
        if not _is_usable(kernel_directory()):
            self.disable()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is not None or not self._enabled:
            return found
        try:
            self._impl.locator.ensure_cache_path()
        except OSError:
            _warn_of_unwritable(kernel_directory())
            return None
        if not is_writable():
            _warn_of_unwritable(kernel_directory())
        self.close()
        types = hashlib.sha256(str(sig).encode()).hexdigest()[:20]
        self._lock = CompileLock(kernel_directory() / f"{self._impl.filename_base}.{types}{_LOCK}")
        self._lock.acquire()
        found = super().load_overload(sig, target_context)  # what another process has stored meanwhile
        if found is not None:
            self.close()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        super().save_overload(sig, data)
        self.close()

    def close(self) -> None:
        """Let other processes compile what this one could not. The cache stays usable."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def compile_kernel(function: Any, args: tuple[Any, ...]) -> None:
    """Load `function` for arguments of these types from disk, or compile and store it."""
    signature = tuple(numba.typeof(arg) for arg in args)
    if signature not in function.overloads:
        function._cache = KernelCache(function.py_func)
        with raising_interrupts(), contextlib.closing(function._cache):
            function.compile(signature)


def address_of(kernel: Any) -> int:
    """The address of an `entry`'s machine code (npqwen/kernels/entry.py), loaded from disk, or compiled and stored."""
    if kernel.address is None:
        kernel._cache = KernelCache(kernel.__wrapped__)
        with raising_interrupts(), contextlib.closing(kernel._cache):
            kernel.compile()
    return int(kernel.address)
