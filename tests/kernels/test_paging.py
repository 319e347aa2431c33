"""Prefetching of mapped files, with memory pages of 4 to 64 KiB: a Raspberry Pi 5 and Macs have 16."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import pytest
from converted import small_model
from numba import njit

from npqwen.engine.weights import Weights
from npqwen.format.config import Config
from npqwen.kernels import compiled, paging
from npqwen.model import Model


def _replace(name: str, function: Any, *types: Any) -> Any:
    """Have kernels that are compiled from now on call `function` for a C function; keep the returned object alive."""
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ssize_t, ctypes.c_size_t, *types)(function)
    llvmlite.binding.add_symbol(f"npqwen_{name}", ctypes.cast(callback, ctypes.c_void_p).value or 0)
    return callback


@pytest.fixture
def requests() -> Iterator[list[tuple[int, int, int]]]:
    """A system that records (address, size, advice) of every request, and reads nothing."""
    calls: list[tuple[int, int, int]] = []

    def madvise(address: int, size: int, advice: int) -> int:
        calls.append((address, size, advice))
        return 0

    callback = _replace("madvise", madvise, ctypes.c_int)
    yield calls
    del callback
    llvmlite.binding.add_symbol("npqwen_madvise", paging._address("madvise"))


@pytest.fixture
def in_memory() -> Iterator[set[int]]:
    """A system that has these addresses' pages in memory; at address 0 its query fails."""
    pages: set[int] = set()

    def mincore(address: int, size: int, residency: int) -> int:
        if 0 in pages:
            return -1
        for i in range(-(-size // paging._PAGE)):
            # The other bits are undefined.
            ctypes.c_uint8.from_address(residency + i).value = 254 | (address + i * paging._PAGE in pages)
        return 0

    callback = _replace("mincore", mincore, ctypes.c_ssize_t)
    yield pages
    del callback
    llvmlite.binding.add_symbol("npqwen_mincore", paging._address("mincore"))


def _compiled() -> Any:
    """prefetch_pages, compiled with the constants and the system of this test."""
    return njit(nogil=True)(paging.prefetch_pages.py_func)


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_a_request_starts_at_a_page(
    page: int, requests: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """madvise refuses any other address; the range requested covers all bytes, and no further page."""
    monkeypatch.setattr(paging, "_PAGE", page)
    prefetch_pages = _compiled()
    base = 1 << 40
    for address, size in ((base, 1), (base + 64, page), (base + page - 64, 128), (base + 5 * page + 576, 30 * page)):
        prefetch_pages(paging.PREFETCH_ALWAYS, address, size, np.empty(4, np.uint8))
        start = address // page * page
        for at, count, advice in requests:
            assert at == start
            assert count <= 1 << 17  # The least that a disk takes at once.
            assert advice == paging._WILLNEED
            start += count
        assert start == address + size
        requests.clear()


@pytest.mark.parametrize("room", [3, 8, 100])
def test_only_absent_pages_are_requested(
    room: int, requests: list[tuple[int, int, int]], in_memory: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few pages one query covers."""
    monkeypatch.setattr(paging, "_PAGE", 4096)
    prefetch_pages, base = _compiled(), 1 << 40
    pages = np.random.default_rng(0).random(300) < 0.5
    pages[100:200] = False
    in_memory.update(base + 4096 * i for i in np.flatnonzero(pages).tolist())
    prefetch_pages(paging.PREFETCH_IF_ABSENT, base + 5000, 290 * 4096, np.empty(room, np.uint8))
    read = {(at - base) // 4096 + i for at, size, _ in requests for i in range(-(-size // 4096))}
    assert read == set(range(1, 292)) - set(np.flatnonzero(pages).tolist())
    assert all(size <= 1 << 17 for _, size, _ in requests)
    requests.clear()
    in_memory.update(base + 4096 * i for i in range(300))
    prefetch_pages(paging.PREFETCH_IF_ABSENT, base + 5000, 290 * 4096, np.empty(room, np.uint8))
    assert not requests
    in_memory.add(0)
    prefetch_pages(paging.PREFETCH_IF_ABSENT, base + 5000, 290 * 4096, np.empty(room, np.uint8))
    assert sum(size for _, size, _ in requests) == 290 * 4096 + 5000 - 4096


def test_residency_is_known_of_files_that_one_owns_or_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To other users Linux reports all pages as being in memory."""
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid, raising=False)
    assert paging.prefetch_policy([path], exceeds_memory=False) == paging.PREFETCH_IF_ABSENT
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1, raising=False)
    assert paging.prefetch_policy([path], exceeds_memory=False) == paging.PREFETCH_IF_ABSENT
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert paging.prefetch_policy([path], exceeds_memory=True) == paging.PREFETCH_ALWAYS
    assert paging.prefetch_policy([path], exceeds_memory=False) == paging.PREFETCH_NEVER
    monkeypatch.setattr(sys, "platform", "darwin")
    assert paging.prefetch_policy([path], exceeds_memory=True) == paging.PREFETCH_ALWAYS
    monkeypatch.setattr(sys, "platform", "win32")
    assert paging.prefetch_policy([path], exceeds_memory=True) == paging.PREFETCH_NEVER


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no madvise")
@pytest.mark.parametrize("policy", [paging.PREFETCH_ALWAYS, paging.PREFETCH_IF_ABSENT])
def test_the_system_accepts_the_request(tmp_path: Path, policy: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * mmap.PAGESIZE))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    address = mapped.ctypes.data
    assert address % mmap.PAGESIZE == 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert madvise(address + mmap.PAGESIZE, mmap.PAGESIZE + 1, paging._WILLNEED) == 0
    paging.prefetch_pages(policy, address + mmap.PAGESIZE + 64, 2 * mmap.PAGESIZE, np.empty(4, np.uint8))


def test_kernels_are_compiled_again_for_another_page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Raspberry Pi 5 can be booted with either of two sizes, and the size is a constant in the machine code."""
    found = set()
    for page in (4096, 16384):
        monkeypatch.setattr(mmap, "PAGESIZE", page)
        found.add(compiled.kernel_directory.__wrapped__())
    assert len(found) == 2


def test_files_are_mapped_from_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset would have to be a multiple of the page size, on Windows of 64 KiB."""
    path = small_model(tmp_path / "model", 4)
    offsets = []
    real = mmap.mmap

    def mapped(fileno: int, length: int, *, access: int, offset: int = 0) -> mmap.mmap:
        offsets.append(offset)
        return real(fileno, length, access=access, offset=offset)

    monkeypatch.setattr("npqwen.engine.weights.mmap.mmap", mapped)
    weights = Weights(path, Config.from_directory(path))
    assert offsets == [0]
    assert all(tensor.data.ctypes.data % 64 == 0 for tensor in weights.tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such advice")
@pytest.mark.parametrize("fits", [True, False])
def test_files_that_fit_into_memory_use_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    path = small_model(tmp_path / "model", 4)
    size = (path / "model.safetensors").stat().st_size
    monkeypatch.setattr("npqwen.engine.engine.available_memory", lambda: 2 * size if fits else size)
    monkeypatch.setattr("npqwen.engine.engine.Budget.check", lambda *_: None)
    with Model(path, threads=1):
        maps = Path("/proc/self/smaps").read_text().split(f"{path}/model.safetensors", 1)[1]
    flags = re.search(r"VmFlags:(.*)", maps)
    assert flags is not None
    supported = Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert ("hg" in flags[1].split()) == (fits and supported)


def test_advice_on_pages_comes_before_the_first_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page stays as small as it was when it was first read."""
    path = small_model(tmp_path / "model", 4)
    events: list[str] = []
    monkeypatch.setattr(Weights, "advise_huge_pages", lambda _: events.append("advice"))
    monkeypatch.setattr(Weights, "check_values", lambda _: events.append("read"))
    with Model(path, threads=1):
        assert events == ["advice", "read"]


SMAPS = """\
7f0000000000-7f0000400000 r--s 00000000 fe:00 17                         {0}/a model.safetensors
Rss:                4096 kB
FilePmdMapped:      2048 kB
VmFlags: rd mr me ms hg
7f0000400000-7f0000800000 r--s 00000000 fe:00 18                         {0}/other.safetensors
FilePmdMapped:      4096 kB
7f0000800000-7f0000c00000 r--s 00400000 fe:00 17                         {0}/a model.safetensors
FilePmdMapped:      4096 kB
7f0000c00000-7f0000d00000 rw-p 00000000 00:00 0
FilePmdMapped:         0 kB
"""


def test_bytes_in_huge_pages(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    smaps = tmp_path / "proc/self/smaps"
    path = tmp_path / "a model.safetensors"
    assert paging.huge_page_bytes([path], tmp_path) is None
    smaps.write_text(SMAPS.format(tmp_path.resolve()))
    assert paging.huge_page_bytes([path], tmp_path) == 6 << 20
    assert paging.huge_page_bytes([path, tmp_path / "other.safetensors"], tmp_path) == 10 << 20
    assert paging.huge_page_bytes([tmp_path / "third"], tmp_path) is None
    smaps.write_text("\n")
    assert paging.huge_page_bytes([path], tmp_path) is None
