"""What the documents say that models need on disk and in memory is what the code computes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import TINY
from make_checkpoint import SIZES
from memory_table import needs

from npqwen.engine.budget import Budget
from npqwen.format.config import read_json
from npqwen.reports.info import inspect

ROOT = Path(__file__).parents[1]
QUANTITIES = {"download": "download", "on disk": "weights", "KV cache": "cache", "memory needed": "needed"}
"""Beginnings of a column's heading, and what the column has."""


def rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of those tables in a document that have a column "memory needed", by the columns' headings."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.M):
        lines = [[cell.strip(" `") for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
        if "memory needed" in lines[0]:
            yield from (dict(zip(lines[0], line, strict=True)) for line in lines[2:])


def size_of(model: str) -> str:
    """The key of `SIZES` for a model's name, such as Qwen/Qwen3-4B-Instruct-2507."""
    return max((size for size in SIZES if size in model), key=len)


def data_bytes(directory: Path) -> int:
    """Of model.safetensors, the header left out."""
    raw = (directory / "model.safetensors").read_bytes()
    return len(raw) - 8 - int(struct.unpack("<Q", raw[:8])[0])


@pytest.mark.parametrize(("name", "count"), [("README.md", 6), ("docs/models.md", 39), ("docs/raspberry-pi.md", 6)])
def test_tables_have_what_is_computed(name: str, count: int) -> None:
    found = list(rows(ROOT / name))
    assert len(found) == count
    for row in found:
        computed = needs(size_of(row["model"]), int(row["--bits"]))
        for heading, cell in row.items():
            for start, quantity in QUANTITIES.items():
                if not heading.startswith(start):
                    continue
                size = getattr(computed, quantity) / 1e9
                if quantity == "needed":  # what mixtures work in is padded to the tiles of the instruction set
                    assert cell.endswith(" GB"), row
                    assert abs(float(cell.removesuffix(" GB")) - size) < 0.05 + computed.working / 1e9, row
                else:
                    assert cell == f"{size:.1f} GB", row


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_converted_model_is_as_large_as_computed(
    bits: int, tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", read_json(TINY / "config.json"))
    info = inspect(tiny(bits), context=2048)
    computed = needs("tiny", bits, context=2048, threads=info.threads)
    assert (computed.weights, computed.cache, computed.working) == (info.weights, info.cache, info.working)
    assert computed.weights == data_bytes(tiny(bits))
    assert computed.download == data_bytes(TINY)


def test_a_mixture_of_30b_in_3_bits_fits_a_raspberry_pi_of_16_gb() -> None:
    """Of its 16 GiB, firmware and a system without desktop leave 15; the budget sets more aside for Python."""
    found = needs("30B-A3B", 3)
    page = found.cache // (8192 // 256)
    assert Budget(found.weights, found.working, page, available=15 << 30).fitting(40960) >= 8192
    four = needs("30B-A3B", 4)
    assert not Budget(four.weights, four.working, page, available=15 << 30).fitting(40960)
