"""Refusals before the machine swaps, with what would fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from npqwen import OutOfMemoryError, cli, kv_cache, machine
from npqwen.kernels.attention import PAGE
from npqwen.model import load


def test_a_cache_that_memory_cannot_hold_is_refused_before_computing(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny(4)) as model:
        cache = model.new_cache()
        monkeypatch.setattr(kv_cache, "available_memory", lambda: 2 * cache.page_bytes + 5)
        with pytest.raises(OutOfMemoryError, match=f"enough for {2 * PAGE} tokens"):
            model.prefill(np.zeros(2 * PAGE + 1, np.int64), cache)
        assert (cache.length, cache.nbytes) == (0, 0)
        model.prefill(np.zeros(2 * PAGE, np.int64), cache)
        monkeypatch.setattr(kv_cache, "available_memory", lambda: 0)
        with pytest.raises(OutOfMemoryError, match=f"enough for {2 * PAGE} tokens"):
            model.forward([1], cache)
        cache.truncate(PAGE)
        model.forward([1], cache)  # What is there already costs nothing.


def test_weights_larger_than_memory_are_told(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1_000_000)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(tiny(4)), "A", "--max-tokens", "1"])
    assert stopped.value.code == 0
    assert "1.0 MB of memory are available" in capsys.readouterr().err


def test_available_memory_is_told_in_bytes() -> None:
    found = machine.available_memory()
    assert found is None or 1e7 < found < 1e14
