"""The rotary embedding's cosines and sines depend on the positions alone, not on which were computed earlier."""

from __future__ import annotations

import numpy as np
from checkpoints import make_config

from npqwen.engine.rope import Rope
from npqwen.format.config import Config


def test_any_positions_in_any_order_are_those_computed_alone() -> None:
    config = Config.from_dict(make_config(head_dim=128, rope_theta=1e6, max_position_embeddings=40960))
    rope, random = Rope(config), np.random.default_rng(0)
    for count in (1, 8, 3, 300):
        positions = random.integers(0, 40960, count)
        angles = positions.astype(np.float32)[:, None] * rope.frequency
        cos, sin = rope.at(positions)
        assert np.array_equal(cos, np.cos(angles))
        assert np.array_equal(sin, np.sin(angles))


def test_tables_are_rows_of_any_positions_across_the_blocks_in_which_they_are_computed() -> None:
    rope = Rope(Config.from_dict(make_config(max_position_embeddings=4096)))
    for start, count in ((250, 20), (0, 1), (4090, 6), (255, 1), (256, 700)):
        for table, rows in zip(rope.tables(start, count), rope.at(np.arange(start, start + count)), strict=True):
            assert np.array_equal(table, rows)
            assert table.shape == (count, len(rope.frequency))
