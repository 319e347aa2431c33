"""Requests for pages of mapped files, on systems with pages of 4 to 64 KiB: a Raspberry Pi 5 and Macs have 16."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
from converted import small_model
from numba import njit

from npqwen import compiled, paging
from npqwen.config import Config
from npqwen.weights import Weights


@pytest.fixture
def asked() -> Iterator[list[tuple[int, int, int]]]:
    """A system that notes (address, size, advice) of every request, and reads nothing."""
    calls: list[tuple[int, int, int]] = []

    def note(address: int, size: int, advice: int) -> int:
        calls.append((address, size, advice))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ssize_t, ctypes.c_size_t, ctypes.c_int)(note)
    llvmlite.binding.add_symbol("npqwen_madvise", ctypes.cast(callback, ctypes.c_void_p).value or 0)
    yield calls
    llvmlite.binding.add_symbol("npqwen_madvise", paging._madvise())


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_a_request_starts_at_a_page(
    page: int, asked: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """madvise refuses any other address; the range asked for holds all that is wanted, and no page more."""
    monkeypatch.setattr(paging, "_PAGE", page)
    ask_for = njit(nogil=True)(paging.ask_for.py_func)
    base = 1 << 40
    for address, size in ((base, 1), (base + 64, page), (base + page - 64, 128), (base + 5 * page + 576, 3 * page)):
        ask_for(address, size)
        start, count, advice = asked.pop()
        assert start % page == 0
        assert start <= address < start + page
        assert start + count == address + size
        assert advice == paging._WILLNEED
    assert not asked


@pytest.mark.skipif(not paging.can_ask(), reason="this system takes no such requests")
def test_the_system_takes_the_request(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * mmap.PAGESIZE))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    address = mapped.ctypes.data
    assert address % mmap.PAGESIZE == 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert madvise(address + mmap.PAGESIZE, mmap.PAGESIZE + 1, paging._WILLNEED) == 0
    paging.ask_for(address + mmap.PAGESIZE + 64, 2 * mmap.PAGESIZE)


def test_kernels_are_compiled_again_for_another_size_of_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Raspberry Pi 5 can be started with either of two: the size is a constant in the machine code."""
    found = set()
    for page in (4096, 16384):
        monkeypatch.setattr(compiled.mmap, "PAGESIZE", page)
        found.add(compiled.kernel_directory.__wrapped__())
    assert len(found) == 2


def test_files_are_mapped_from_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset would have to be a multiple of the page's size, of Windows' 64 KiB even."""
    path = small_model(tmp_path / "model", 4)
    offsets = []
    real = mmap.mmap

    def mapped(fileno: int, length: int, *, access: int, offset: int = 0) -> mmap.mmap:
        offsets.append(offset)
        return real(fileno, length, access=access, offset=offset)

    monkeypatch.setattr("npqwen.weights.mmap.mmap", mapped)
    weights = Weights(path, Config.from_directory(path))
    assert offsets == [0]
    assert all(tensor.data.ctypes.data % 64 == 0 for tensor in weights.tensors.values())
