"""The pages of a cache: arrays of PAGE positions, their shape and dtype, and views of parts of them.

npqwen/kernels/cache_page.py and int8_page.py have the layout of a page.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.cache_type import CacheType
from npqwen.format.config import Config
from npqwen.format.layout import ceil_div
from npqwen.kernels.cache_page import PAGE, POSITION_TILE
from npqwen.kernels.int8_page import INT8_TILE, clear_int8_positions, int8_tile_bytes


class Pages:
    """A cache's pages. Replaced as a whole, never modified: an interrupt never leaves the address of a freed page.

    arrays: each of `page_shape`. addresses: of the pages, 0 for those not allocated yet.
    """

    def __init__(self, arrays: list[NDArray[Any]], addresses: NDArray[np.int64]) -> None:
        self.arrays = arrays
        self.addresses = addresses
        self.table = int(addresses.ctypes.data)
        """The address of `addresses`."""


def tile_positions(kv: CacheType) -> int:
    """Positions of a tile, the smallest unit in which pages are copied."""
    return INT8_TILE if kv == "int8" else POSITION_TILE


def page_shape(config: Config, kv: CacheType) -> tuple[int, int, int, int, int]:
    """The shape of a page: (attention layers, 2 for keys and values, heads, tiles, elements of a tile)."""
    layers = sum(not config.is_recurrent(layer) for layer in range(config.num_hidden_layers))
    dim = config.head_dim
    elements = int8_tile_bytes(dim) if kv == "int8" else POSITION_TILE * dim
    return layers, 2, config.num_key_value_heads, PAGE // tile_positions(kv), elements


def page_part(page: NDArray[Any], positions: int, tile: int) -> NDArray[Any]:
    """A view of the first `positions` positions of a page, rounded up to whole tiles of `tile` positions."""
    return page[:, :, :, : ceil_div(positions, tile)]


def clear_positions(page: NDArray[Any], first: int, kv: CacheType) -> None:
    """Zero the positions of a page's last tile starting at `first`. page: (layers, 2, heads, tiles, elements)."""
    if kv == "int8":
        clear_int8_positions(page[:, :, :, -1], first)
        return
    shape, dim = page.shape[:4], page.shape[4] // POSITION_TILE
    page.reshape(*shape, dim, POSITION_TILE)[:, 0, :, -1, :, first:] = 0
    page.reshape(*shape, POSITION_TILE, dim)[:, 1, :, -1, first:] = 0
