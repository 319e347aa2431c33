"""The oracle: examples/qwen3_in_numpy.py, plain NumPy in float32, with the interface of npqwen's own model.

It shares no code with the package but the config, the tokenizer and the generation loop, which can drive it in place of
a `Model`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npqwen.errors import ContextLengthError
from npqwen.format.config import Config

# Programs that the tests start find the examples too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import qwen3_in_numpy
from qwen3_in_numpy import read_safetensors, read_weights, rope_tables

__all__ = ["ReferenceCache", "ReferenceModel", "qwen3_in_numpy", "read_safetensors", "rope_tables"]


class ReferenceCache(qwen3_in_numpy.Cache):
    """The example's cache, with the most tokens it may hold."""

    def __init__(self, config: Config, limit: int = 1 << 31) -> None:
        super().__init__(config)
        self.limit = limit


class ReferenceModel:
    """A dense Qwen3 with the interface of `npqwen.model.Model`.

    weights: the checkpoint's tensors under their own names, float32 (so a test may hand in weights that went
    through a quantizer).
    """

    bits = 32
    weight_bytes = 0

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, np.ndarray],
        path: Path | None = None,
        context: int | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.context = context or config.max_position_embeddings
        if path is not None:
            from npqwen.generation.generation_config import GenerationConfig
            from npqwen.tokenizer import Tokenizer

            self.path = path
            self.tokenizer = Tokenizer.from_directory(path)
            self.generation_config = GenerationConfig.from_directory(path)

    @classmethod
    def from_directory(cls, path: Path, context: int | None = None) -> ReferenceModel:
        return cls(Config.from_directory(path), read_weights(path), path, context)

    def new_cache(self, room: int | None = None) -> ReferenceCache:
        return ReferenceCache(self.config, room or self.context)

    def forward(self, ids: Any, cache: ReferenceCache, *, all_logits: bool = False, out: Any = None) -> np.ndarray:
        past, n = cache.length, len(ids)
        if past + n > self.context:
            raise ContextLengthError(f"{past + n} tokens do not fit the context of {self.context}")
        h = qwen3_in_numpy.forward(self.config, self.weights, ids, cache)
        return qwen3_in_numpy.output_logits(self.config, self.weights, h if all_logits else h[-1:])

    def prefill(
        self, ids: Any, cache: ReferenceCache, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        for start in range(0, len(ids), 64):
            part = ids[start : start + 64]
            logits = self.forward(part, cache)
            if progress is not None:
                progress(start + len(part), len(ids))
        return logits[-1]

    def logits(self, ids: Any) -> np.ndarray:
        return self.forward(ids, self.new_cache(), all_logits=True)

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        from npqwen.generation import generate as text

        return text.stream(self, prompt, **options)

    def generate(self, prompt: str, **options: Any) -> Any:
        from npqwen.generation import generate as text

        return text.generate(self, prompt, **options)

    def close(self) -> None:
        pass
