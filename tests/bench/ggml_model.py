"""llama.cpp as a language model that npqwen evaluates: its own quantizers, kernels and recipes on the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf_from_checkpoint
import numpy as np
from engine import Llama
from gguf import GGUFReader
from numpy.typing import ArrayLike, NDArray

from npqwen.engine.kv_cache import KVCache
from npqwen.model import Model

CONTEXT = 512


class _Cache(KVCache):
    """llama.cpp's only cache."""

    def __init__(self, base: Model, llama: Llama) -> None:
        super().__init__(base.config, 0, np.float32)
        self._llama = llama

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._llama.truncate(length)


class GgmlModel:
    """A GGUF file with the tokenizer and dimensions of the npqwen model `base`."""

    def __init__(self, path: Path, base: Model) -> None:
        self.path = path
        self.config, self.tokenizer, self.generation_config = base.config, base.tokenizer, base.generation_config
        self.context = CONTEXT
        self.fingerprint = str(path)
        self._base = base
        self._llama = Llama(path, base.threads, CONTEXT, "off", False)

    def new_cache(self, room: int | None = None) -> KVCache:
        self._llama.truncate(0)
        return _Cache(self._base, self._llama)

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        tokens = np.asarray(ids, np.int32)
        self._llama.run(tokens, every=all_logits)
        cache.length += tokens.size
        return self._llama.logits(tokens.size if all_logits else 1)

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        last: NDArray[np.float32] = self.forward(ids, cache)[0]
        return last


def quantized(checkpoint: Path, kind: str, place: Path) -> Path:
    """A checkpoint quantized by llama.cpp's recipe of this name, without importances, in the directory `place`."""
    floats, out = place / "bf16.gguf", place / f"{kind}.gguf"
    if not floats.exists():
        gguf_from_checkpoint.write_float(checkpoint, floats, "bf16")
    gguf_from_checkpoint.quantize(floats, out, kind)
    return out


def bits_per_weight(path: Path) -> float:
    """Stored bits of the matrices, scales included, per weight."""
    matrices = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return float(8 * sum(tensor.n_bytes for tensor in matrices) / sum(tensor.n_elements for tensor in matrices))
