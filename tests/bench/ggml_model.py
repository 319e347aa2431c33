"""llama.cpp as a language model that npqwen evaluates: its own quantizers, kernels and recipes on the same text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import gguf_from_checkpoint
import numpy as np
from engine import Llama
from npqwen_quant import moments
from npqwen_quant.checkpoint import Checkpoint
from numpy.typing import ArrayLike, NDArray

from npqwen.engine.kv_cache import KVCache
from npqwen.engine.piece import Piece
from npqwen.engine.prefixes import Prefixes
from npqwen.generation.drafting import Drafting
from npqwen.model import Model

CONTEXT = 512


class _Cache(KVCache):
    """llama.cpp's only cache."""

    def __init__(self, base: Model, llama: Llama) -> None:
        super().__init__(base.config, 0, "f32")
        self._llama = llama

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._llama.truncate(length)


class GgmlModel:
    """A GGUF file with the tokenizer and dimensions of the npqwen model `base`."""

    def __init__(self, path: Path, base: Model) -> None:
        self.path = path
        self.adapters = base.adapters
        self.config, self.tokenizer, self.generation_config = base.config, base.tokenizer, base.generation_config
        self.context = CONTEXT
        self.fingerprint = str(path)
        self.name = path.name
        self._base = base
        self._llama = Llama(path, base.threads, CONTEXT, "off", False)

    def new_cache(self, room: int | None = None, adapter: str | None = None) -> KVCache:
        assert adapter is None
        self._llama.truncate(0)
        return _Cache(self._base, self._llama)

    chunk = 256
    drafting = Drafting()
    weight_bytes = 0
    prefixes = Prefixes(0)

    def new_logits(self, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, self.config.vocab_size), np.float32)

    def forward_pieces(
        self,
        pieces: Sequence[Piece],
        out: NDArray[np.float32] | None = None,
        maxima: NDArray[np.float32] | None = None,
    ) -> list[NDArray[np.float32]]:
        assert maxima is None
        (piece,) = pieces  # llama.cpp's context holds one sequence
        return [self.forward(piece.ids, piece.cache, all_logits=True)[piece.ids.size - piece.rows :]]

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


def quantized(
    checkpoint: Path, kind: str, place: Path, importances: Mapping[str, NDArray[np.float32]] | None = None
) -> Path:
    """A checkpoint quantized by llama.cpp's recipe of this name, in the directory `place`."""
    floats, out = place / "bf16.gguf", place / f"{kind}{'-with-importances' if importances else ''}.gguf"
    if not floats.exists():
        gguf_from_checkpoint.write_float(checkpoint, floats, "bf16")
    gguf_from_checkpoint.quantize(floats, out, kind, importances=importances)
    return out


def importances(directory: Path, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Mean squares of the inputs of each column of all matrices, by GGUF names; of experts (experts, columns).

    ids: the text (sequences, tokens). They are what llama.cpp's imatrix program computes. Not of hybrids.
    """
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    if config.recurrence is not None:
        raise SystemExit(f"{directory} is a hybrid, whose importances are not computed; leave out +self")

    def load(name: str, prefix: str = "") -> NDArray[np.float32]:
        source = checkpoint.tensors[prefix + name]
        return source.floats(0, source.shape[0])

    found: dict[str, moments.Moments] = {}
    hidden = load("model.embed_tokens.weight")[ids]
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."

        def of_layer(name: str, prefix: str = prefix) -> NDArray[np.float32]:
            return load(name, prefix)

        widest = config.intermediate_size + config.num_attention_heads * config.head_dim
        halves: list[Mapping[str, moments.Moments]] = [moments.attention(config, of_layer, hidden, widest)]
        if config.is_sparse(i):
            halves += list(moments.mixture(config, of_layer, hidden, widest))
        else:
            halves.append(moments.feed_forward(config, of_layer, hidden, widest))
        found |= {prefix + name: inputs for half in halves for name, inputs in half.items()}
    found["lm_head.weight"] = moments.last(config, load, hidden, 1 << 20)
    if config.tie_word_embeddings:
        found["model.embed_tokens.weight"] = found["lm_head.weight"]
    arch = gguf.MODEL_ARCH.QWEN3MOE if config.mixture is not None else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stacks: dict[str, list[NDArray[np.float32]]] = {}
    for name, inputs in found.items():
        match = gguf_from_checkpoint.EXPERT.fullmatch(name)
        target = names.get_name(match[1] + match[3] if match else name, try_suffixes=(".weight",))
        assert target is not None
        stacks.setdefault(target, []).append(np.diag(inputs.sums[0]) / np.float32(max(inputs.count, 1)))
    return {name: np.stack(stack) for name, stack in stacks.items()}


def bits_per_weight(path: Path) -> float:
    """Stored bits of the matrices, scales included, per weight."""
    matrices = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1]
    return float(8 * sum(tensor.n_bytes for tensor in matrices) / sum(tensor.n_elements for tensor in matrices))
