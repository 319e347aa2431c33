"""The oracle: examples/qwen3_in_numpy.py, plain NumPy in float32, as a `LanguageModel`.

It shares no computation with the package, only the config, the tokenizer and the generation loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from maxima import write_maxima
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from npqwen.engine.adapters import Adapters
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.piece import Piece
from npqwen.engine.prefixes import Prefixes
from npqwen.errors import ContextLengthError
from npqwen.format.config import Config
from npqwen.generation.drafting import Drafting
from npqwen.generation.generate import generate, stream
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.stream import Stream
from npqwen.tokenizer import Tokenizer

# Programs that the tests start find the examples too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import qwen3_in_numpy
from qwen3_in_numpy import read_safetensors, read_weights, rope_tables

__all__ = ["ReferenceCache", "ReferenceModel", "qwen3_in_numpy", "read_safetensors", "rope_tables"]

Array = NDArray[np.float32]


class ReferenceCache(KVCache):
    """A cache without pages; the keys and values are in `arrays`, the example's own cache."""

    def __init__(self, config: Config, limit: int = 1 << 31) -> None:
        super().__init__(config, 0, "f32")
        self.limit = limit
        self.arrays = qwen3_in_numpy.Cache(config)

    def reserve(self, tokens: int) -> None:
        """The arrays grow by themselves."""

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.arrays.truncate(length)

    def fork(self, length: int | None = None) -> ReferenceCache:
        fork = copy(self)
        fork.arrays = self.arrays.fork(length)
        fork.length = fork.arrays.length
        return fork


class ReferenceModel:
    """A Qwen3 that generation can drive in place of a `Model`.

    weights: the checkpoint's tensors under their own names, float32 (so a test may hand in weights that went through a
    quantizer). path: the checkpoint; without it there is no tokenizer.
    """

    bits = 32
    threads = 1
    weight_bytes = 0
    name = fingerprint = "reference"
    prefixes = Prefixes(0)
    tokenizer: Tokenizer
    generation_config: GenerationConfig

    def __init__(
        self, config: Config, weights: Mapping[str, Any], path: Path | None = None, context: int | None = None
    ) -> None:
        self.config = config
        self.adapters = Adapters({}, config)
        self.drafting = Drafting()
        self.weights = weights
        self.context = context or config.max_position_embeddings
        self.path = path or Path("reference")
        if path is not None:
            self.tokenizer = Tokenizer.from_directory(path)
            self.generation_config = GenerationConfig.from_directory(path)

    @classmethod
    def from_directory(cls, path: Path, context: int | None = None) -> Self:
        return cls(Config.from_directory(path), read_weights(path), path, context)

    chunk = 256

    def new_logits(self, rows: int) -> Array:
        return np.empty((rows, self.config.vocab_size), np.float32)

    def forward_pieces(
        self, pieces: Sequence[Piece], out: Array | None = None, maxima: Array | None = None
    ) -> list[Array]:
        found = [
            self.forward(piece.ids, piece.cache, all_logits=True)[piece.ids.size - piece.rows :] for piece in pieces
        ]
        write_maxima(found, maxima)
        return found

    def new_cache(self, room: int | None = None, adapter: str | None = None) -> ReferenceCache:
        assert adapter is None
        return ReferenceCache(self.config, room or self.context)

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: Array | None = None
    ) -> Array:
        assert isinstance(cache, ReferenceCache)
        tokens = np.asarray(ids)
        past, n = cache.length, tokens.size
        if past + n > self.context:
            raise ContextLengthError(f"{past + n} tokens do not fit the context of {self.context}")
        h = qwen3_in_numpy.forward(self.config, self.weights, tokens, cache.arrays)
        cache.length += n
        return qwen3_in_numpy.output_logits(self.config, self.weights, h if all_logits else h[-1:])

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> Array:
        tokens = np.asarray(ids)
        for start in range(0, tokens.size, 64):
            part = tokens[start : start + 64]
            logits = self.forward(part, cache)
            if progress is not None:
                progress(start + part.size, tokens.size)
        last: Array = logits[-1]
        return last

    def logits(self, ids: ArrayLike) -> Array:
        return self.forward(ids, self.new_cache(), all_logits=True)

    def stream(self, prompt: str, **options: Any) -> Stream:
        return stream(self, prompt, **options)

    def generate(self, prompt: Any, **options: Any) -> Any:
        return generate(self, prompt, **options)

    def close(self) -> None:
        pass


_: type[LanguageModel] = ReferenceModel
