"""Compiled kernels kept on disk, so that a machine compiles them once.

Numba's own cache does not notice a change in a function that the cached one calls. So the directory is named after
everything that the machine code depends on: the kernels' sources, the versions that compiled them, the instruction set,
the processor and the size of its memory pages.
"""

from __future__ import annotations

import hashlib
import inspect
import mmap
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, event
from numba.core.registry import cpu_target

from npqwen.cache_directory import cache_directory
from npqwen.simd.isa import ISA

_SOURCES = ("simd", "kernels", "format/encodings.py", "engine/forward.py", "engine/records.py", "reports/bandwidth.py")
FUNCTIONS = 96
"""About how many functions are compiled, for the progress shown."""


def _digest_of_sources() -> bytes:
    digest = hashlib.sha256()
    here = Path(__file__).parents[1]
    for source in _SOURCES:
        for path in sorted((here / source).glob("*.py")) if (here / source).is_dir() else [here / source]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


_DIGEST = _digest_of_sources()
"""Computed at import: an upgrade may change the sources before the first kernel is compiled."""


@cache
def kernel_directory() -> Path:
    """The directory of the kernels that these sources and versions compile for this processor."""
    digest = hashlib.sha256(_DIGEST)
    codegen = cpu_target.target_context.codegen().magic_tuple()
    versions = numba.__version__, llvmlite.__version__, platform.python_version()
    for part in (*versions, ISA.name, codegen, mmap.PAGESIZE):
        digest.update(repr(part).encode())
    return cache_directory() / "kernels" / f"{ISA.name}-{digest.hexdigest()[:20]}"


class _Locator(caching._CacheLocator):
    """Numba's locator of cache files: all are in the kernel directory, whose name changes with the sources."""

    def get_cache_path(self) -> str:
        return str(kernel_directory())

    def get_source_stamp(self) -> str:
        return kernel_directory().name

    def get_disambiguator(self) -> str:
        return "0"


class _Entries(caching.CompileResultCacheImpl):
    def __init__(self, function: Any) -> None:
        # Not Numba's, which goes elsewhere if NUMBA_CACHE_LOCATOR_CLASSES is set: only our directory is named after
        # all that the code depends on.
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator()
        name = f"{Path(inspect.getfile(function)).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))


class CodeCache(caching.FunctionCache):
    """Numba's cache of one function, which compiles again if an entry is damaged or cannot be written."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling a damaged file raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()
        except Exception:  # the index is damaged: begin a new one
            try:
                self.flush()
                super().save_overload(sig, data)
            except OSError:
                self.disable()


class KernelCache(CodeCache):
    """A kernel's compiled code, in the kernel directory."""

    _impl_class = _Entries


class _Counter(event.Listener):
    """Reports each function as Numba begins to compile it."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.count = 0
        self.report = report

    def on_start(self, event: Any) -> None:
        self.count += 1
        self.report(min(self.count, FUNCTIONS) - 1, FUNCTIONS)

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def reporting(on_compile: Callable[[int, int], None] | None) -> Iterator[None]:
    """Call on_compile(done, total) as functions are compiled inside the `with` block; never if none are."""
    if on_compile is None:
        yield
        return
    counter = _Counter(on_compile)
    with event.install_listener("numba:compile", counter):
        yield
    if counter.count:
        on_compile(FUNCTIONS, FUNCTIONS)


@contextmanager
def _raising_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end if Ctrl-C came in a callback of LLVM, where Python only prints it."""
    before, interrupts = sys.unraisablehook, []

    def hook(ignored: sys.UnraisableHookArgs, /) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            interrupts.append(True)
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
    if interrupts:
        raise KeyboardInterrupt


def compile_kernel(function: Any, args: tuple[Any, ...]) -> None:
    """Load `function` for arguments of these types from disk, or compile and store it."""
    signature = tuple(numba.typeof(arg) for arg in args)
    if signature not in function.overloads:
        function._cache = KernelCache(function.py_func)
        with _raising_interrupts():
            function.compile(signature)


def address_of(kernel: Any) -> int:
    """The address of an `entry`'s machine code (npqwen/kernels/entry.py), loaded from disk, or compiled and stored."""
    if kernel.address is None:
        kernel._cache = KernelCache(kernel.__wrapped__)
        with _raising_interrupts():
            kernel.compile()
    return int(kernel.address)
