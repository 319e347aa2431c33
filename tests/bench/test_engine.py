"""Depths of a benchmark: the cache holds exactly the tokens that it should, however it got there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine import Ids, Npqwen, batch, decode, prefill, seek, stream


@pytest.mark.parametrize("name", ["qwen35", "tiny"])
def test_a_depth_is_the_same_on_every_way(
    hybrid: Callable[[str, int], Path], tiny: Callable[[int], Path], name: str
) -> None:
    path = tiny(16) if name == "tiny" else hybrid(name, 16)

    def logits_at(depth: int, *ways: Callable[[Npqwen, Ids], object]) -> np.ndarray:
        """The logits of the token after a depth, to which a new engine comes after `ways`."""
        one = Npqwen(path, 1, 512, "on", False)
        ids = stream(one.vocabulary(), 512)
        for way in ways:
            way(one, ids)
        seek(one, ids, depth)
        assert one.length() == one._cache.length == depth
        return np.array(one._model.forward(ids[depth : depth + 1], one._cache))

    for depth in (0, 70, 300):
        want = logits_at(depth)
        ways = (
            lambda one, ids: prefill(one, ids, 90),
            lambda one, ids: decode(one, ids, 3, 300),
            lambda one, ids: batch(one, ids, 4, 70, 2),
            lambda one, ids: decode(one, ids, 2, 70),
        )
        for count in range(1, len(ways) + 1):
            np.testing.assert_allclose(logits_at(depth, *ways[:count]), want, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_cut_is_filled_again() -> None:
    class Hybrid:
        """Notes what runs. It can be emptied, or go back to what was kept."""

        def __init__(self) -> None:
            self.ids: list[int] = []
            self.kept = 0
            self.ran = 0

        def length(self) -> int:
            return len(self.ids)

        def reusable(self, length: int) -> int:
            return self.kept if self.kept <= length else 0

        def truncate(self, length: int) -> None:
            assert length in (0, self.kept)
            del self.ids[length:]

        def keep(self) -> None:
            self.kept = len(self.ids)

        def run(self, ids: Ids, *, every: bool) -> None:
            self.ids += ids.tolist()
            self.ran += ids.size

    one = Hybrid()
    ids = np.arange(20, dtype=np.int32)
    for depth, ran in ((10, 10), (10, 10), (15, 12), (12, 24), (0, 24)):
        seek(one, ids, depth)  # type: ignore[arg-type]
        assert (one.ids, one.ran) == (list(range(depth)), ran)
        one.run(ids[depth : depth + 3], every=False)
        one.ran -= 3
