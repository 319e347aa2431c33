"""The draft layer of a checkpoint (multi-token prediction), which drafts the token after the next."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npqwen.engine.arrays import ids_array
from npqwen.engine.draft_input import draft_input
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.piece import Piece
from npqwen.engine.records import Output
from npqwen.errors import OptionError
from npqwen.format.encodings import UNIT_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

    from npqwen.engine.cache_type import CacheType
    from npqwen.engine.runner import Runner


class DraftLayer:
    """One more attention layer, with the model's embedding and output matrix."""

    def __init__(
        self, runner: Runner, context: int, kv: CacheType, chunk: int, evict: Callable[[], bool]
    ) -> None:
        """context, kv, evict: of its caches, see `KVCache`. chunk: the most tokens that it runs at once."""
        self._runner, self._chunk = runner, chunk
        self._model = runner.weights.model
        self._origin = object()
        self._cache_options = context, kv, self._origin, evict

    def compile(self) -> None:
        """Load or compile its own kernel, and take over the addresses of the model's, which must be compiled."""
        weights = self._runner.weights
        self._model = weights.model.copy()
        self._model["norm"] = weights.draft["norm"]
        states = np.zeros((1, self._runner.config.hidden_size), np.float32)
        self._runner.compile_function(draft_input, self._input_arguments(0, np.zeros(1, np.int64), states))

    @property
    def share(self) -> float:
        """Bytes of weights that it reads for one token and half the vocabulary, as a fraction of those that a pass of
        the model reads."""
        mixture, tensors = self._runner.config.mixture, self._runner.weights.tensors
        chosen = 1.0 if mixture is None else mixture.num_experts_per_tok / mixture.num_experts
        read = {name: one.data.size * (chosen if ".experts." in name else 1) for name, one in tensors.items()}
        own = sum(size for name, size in read.items() if name.startswith("mtp."))
        embedding = read["model.embed_tokens.weight"]
        output = read.get("lm_head.weight", embedding)
        others = sum(read.values()) - own - (embedding if "lm_head.weight" in read else 0)
        return float((own + output / 2) / others)

    def new_cache(self) -> KVCache:
        """An empty cache for its keys and values."""
        return KVCache(replace(self._runner.config, num_hidden_layers=1, recurrence=None), *self._cache_options)

    def run(
        self,
        ids: ArrayLike,
        states: NDArray[np.float32],
        cache: KVCache,
        out: NDArray[np.float32],
        *,
        groups: NDArray[np.int64] | None = None,
        normed: bool = False,
        chained: bool = False,
    ) -> NDArray[np.float32]:
        """Draft the token after `ids`, whose keys and values are appended to the cache.

        ids: consecutive tokens of a text, at most those of a pass, that follow those in the cache. states: float32
        (tokens, hidden_size), for each of them the hidden state of the *previous* token: the model's last layer's, see
        `KVCache.tail`; or if `chained`, the one that this method returned for it, a draft token. normed: first
        apply the final norm to the states, that of the model, or of the draft layer if `chained`. cache: of
        `new_cache`; its first token may be anywhere in the text, since only distances matter. out: float32 (1, n) with
        n a multiple of 16, receives logits after the last token: of the lowest ids and, in its last columns, of
        `groups`, int64: group i is the 16 ids starting at 16 * i.

        Returns the layer's hidden state of the last token, float32 (hidden_size,), before its norm. Raises OptionError,
        OutOfMemoryError and ClosedError.
        """
        runner = self._runner
        weights, hidden_size = runner.weights, runner.config.hidden_size
        tokens = ids_array(ids, runner.config.vocab_size)
        if cache.origin is not self._origin:
            raise OptionError("the cache belongs to another model; make one with this draft layer's new_cache()")
        if tokens.size > self._chunk or states.shape != (tokens.size, hidden_size) or states.dtype != np.float32:
            shape = tokens.size, hidden_size
            raise OptionError(f"states must be float32 {shape}, and at most {self._chunk} at a time")
        output = self._output(tokens.size, out, np.zeros(0, np.int64) if groups is None else groups)
        norm = 0
        if normed:
            norm = int((weights.draft if chained else weights.model)["norm"][0])
        with cache.in_use:
            cache.reserve(tokens.size)
            with runner.turn():
                arguments = self._input_arguments(norm, tokens, np.ascontiguousarray(states))
                runner.run(draft_input, tokens.size, *arguments)
                runner.forward([Piece(tokens, cache, 1)], weights.draft_layers, False, output, self._model)
                cache.advance(tokens.size)
                last: NDArray[np.float32] = runner.buffers.activations.hidden[tokens.size - 1, :hidden_size].copy()
                return last

    def _output(self, tokens: int, out: NDArray[np.float32], groups: NDArray[np.int64]) -> Output:
        """An `Output` that writes the logits after the last token to `out`. Raises OptionError for wrong arrays."""
        rows = int(self._model["lm_head"]["rows"][0])
        if groups.dtype != np.int64 or groups.ndim != 1 or (groups < 0).any() or (groups >= rows // UNIT_ROWS).any():
            raise OptionError(f"groups must be int64, from 0 to {rows // UNIT_ROWS - 1}")
        wrong = out.ndim != 2 or len(out) != 1 or out.shape[1] % UNIT_ROWS
        if wrong or not out.flags.carray or out.dtype != np.float32:
            raise OptionError(f"out must be a writable float32 array (1, n), n a multiple of {UNIT_ROWS}")
        chosen = UNIT_ROWS * groups.size
        lowest = out.shape[1] - chosen
        if not 0 < lowest <= rows:
            raise OptionError(
                f"out has {out.shape[1]} columns; with {groups.size} groups of {UNIT_ROWS} ids it needs "
                f"{chosen + UNIT_ROWS} to {chosen + rows}"
            )
        last = np.array([tokens - 1], np.int64)
        return Output(last, False, out[:, :lowest], np.ascontiguousarray(groups), out[:, lowest:])

    def _input_arguments(self, norm: int, ids: NDArray[np.int64], states: NDArray[np.float32]) -> tuple[Any, ...]:
        """The arguments of `draft_input` after the member's row and number."""
        buffers, weights = self._runner.buffers, self._runner.weights
        return weights.model[0], weights.draft[0], norm, ids, states, buffers.activations, buffers.workspace
