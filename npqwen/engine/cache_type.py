"""The element types of a KV cache, as `load(kv=)` and `--kv` name them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from npqwen.errors import OptionError
from npqwen.wording import quoted

CacheType = Literal["int8", "f16", "f32"]
PAGE_DTYPES: dict[CacheType, np.dtype[Any]] = {
    "int8": np.dtype(np.uint8),
    "f16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
}
"""The dtype of a page's array, which selects the kernels. int8: bytes, as scales are interleaved with the elements.
f16: the elements' bits, as Numba has no float16."""


def check_cache_type(kv: object) -> CacheType:
    """kv as a CacheType; OptionError unless it is one."""
    for known in get_args(CacheType):
        if kv == known:
            return known  # type: ignore[no-any-return]
    raise OptionError(f"kv is {quoted(kv)}; it can be int8, f16 or f32")
