"""The engine: token ids in, logits out. It knows nothing of text, sampling or conversations."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npqwen.engine.budget import Budget
from npqwen.engine.buffers import Buffers
from npqwen.engine.fingerprint import fingerprint
from npqwen.engine.forward import forward
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.rope import Rope
from npqwen.engine.team import Team, check_threads
from npqwen.engine.weights import Weights
from npqwen.errors import ContextLengthError, OptionError, OutOfMemoryError
from npqwen.format.config import Config
from npqwen.hardware.machine import HEADROOM, available_memory, default_threads
from npqwen.kernels.attention import attention_kernels
from npqwen.kernels.compiled import compile_kernel, reporting
from npqwen.kernels.matmul import matmul_kernels
from npqwen.kernels.paging import prefetch_policy

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 256
"""Tokens of a prompt that one pass runs."""
SPARSE_CHUNK = 512
"""Tokens of a prompt that one pass of a mixture of experts runs: each expert sees only a part of them."""
SHORT_PASS = 4
"""Passes of at most this many tokens run on the calling thread too: Ctrl-C can wait that long."""


class Engine:
    """A converted Qwen3 model, mapped into memory, and the threads that compute with it.

    Any number of threads may call it: one forward pass runs at a time, on all of the engine's own threads, and the
    other callers wait. `close()`, or a `with` statement, ends those threads and unmaps the files.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Map the converted directory `path`; see `npqwen.model.load` for the options and errors."""
        if threads is not None:
            check_threads(threads)
        self.path = path
        self.config = Config.from_directory(path)
        self.context = context_length(self.config, context)
        """Maximum tokens of a prompt and its continuation together."""
        self.weights = Weights(path, self.config)
        self.weight_bytes = self.weights.nbytes
        """Bytes of the mapped weights."""
        available = available_memory()
        self._exceeds_memory = available is not None and self.weight_bytes > 0.9 * available
        if not self._exceeds_memory:
            self.weights.advise_huge_pages()
        self.weights.model[0]["prefetch"] = prefetch_policy(self.weights.paths, self._exceeds_memory)
        self.bits = self.weights.bits
        self.cache_dtype = self.weights.cache_dtype
        self.threads = default_threads() if threads is None else int(threads)
        self._origin = object()
        self._rope = Rope(self.config)
        self._team = Team(self.threads)
        # An engine that nobody closed ends its threads when it is collected; at exit they are daemons.
        weakref.finalize(self, self._team.close).atexit = False
        self.chunk = chunk_size(self.config)
        self._buffers = Buffers(self.config, self.weights, self.threads, self.chunk)
        page = self.new_cache(1).page_bytes
        Budget(self.weight_bytes, self._buffers.nbytes, page, available).check(context)
        self._turns: dict[int, threading.Lock] = {}
        with reporting(on_compile):
            self._compile()

    def _compile(self) -> None:
        """Load the kernels from disk, or compile them."""
        cache = self.new_cache(1)
        model = self.weights.model[0]
        model["matmul_kernels"] = matmul_kernels(self.weights.encodings)
        model["attention_kernels"] = attention_kernels(cache.dtype_array.dtype)
        sample = self._arguments(np.zeros(1, np.int64), cache, 1, self._buffers.logits(1))
        compile_kernel(forward, (self._team.state, 0, *sample))

    def new_cache(self, room: int | None = None) -> KVCache:
        """An empty cache for one sequence of up to `room` tokens (default: the context)."""
        if room is not None and not 0 < room <= self.context:
            raise ContextLengthError(f"a cache for {room} tokens: the model's context is {self.context}")
        return KVCache(self.config, self.context if room is None else room, self.cache_dtype, self._origin)

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Run `ids` after the tokens in the cache, and append their keys and values to it.

        Returns float32 logits: (1, vocab_size) of the last token, or (tokens, vocab_size) with all_logits. `out`, of
        the same shape, receives them if given, which saves allocating them for every token. Inputs longer than
        `chunk` tokens run in chunks; after an interrupt the cache holds the chunks that were completed.

        Raises before computing: ContextLengthError and OutOfMemoryError; OptionError for ids outside the vocabulary,
        for another model's cache and for an `out` of the wrong shape or dtype.
        """
        tokens = self._check(ids)
        self._reserve(cache, tokens.size)
        out = self._logits(tokens.size if all_logits else 1, out)
        for at in range(0, tokens.size, self.chunk):
            end = min(at + self.chunk, tokens.size)
            rows = out[at:end] if all_logits else out[: end == tokens.size]
            self._pass(tokens[at:end], cache, rows)
        return out

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Run a prompt after the tokens in the cache; float32 logits (vocab_size,) of its last token.

        progress(done, total) is called after every chunk. Raises what `forward` raises.
        """
        tokens = self._check(ids)
        self._reserve(cache, tokens.size)
        out = self._logits(1, None)
        for at in range(0, tokens.size, self.chunk):
            end = min(at + self.chunk, tokens.size)
            self._pass(tokens[at:end], cache, out[: end == tokens.size])
            if progress is not None:
                progress(end, tokens.size)
        last: NDArray[np.float32] = out[0]
        return last

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """float32 logits (tokens, vocab_size) after every token of a text. Raises what `forward` raises."""
        tokens = self._check(ids)
        return self.forward(tokens, self.new_cache(min(tokens.size, self.context)), all_logits=True)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config and samples of the weights; see `npqwen.engine.fingerprint`."""
        return fingerprint(self.config, self.weights)

    def _pass(self, ids: NDArray[np.int64], cache: KVCache, out: NDArray[np.float32]) -> None:
        """One forward pass of at most `chunk` tokens; `out` receives the logits of the last len(out) tokens."""
        rows = len(out)
        with self._turn():
            logits = self._buffers.logits(rows)
            # A single row needs no padding tokens: the kernels write it in place.
            direct = rows == 1 and out.shape[1] == logits.shape[1] and out.flags.c_contiguous
            # Weights that do not fit into memory are read from disk: then no pass is short.
            here = ids.size <= SHORT_PASS and not self._exceeds_memory
            self._team.run(forward, *self._arguments(ids, cache, rows, out if direct else logits), here=here)
            cache.length += ids.size
            if not direct:
                out[:] = logits[:rows, : self.config.vocab_size]

    def _reserve(self, cache: KVCache, tokens: int) -> None:
        """Make room for more tokens in a cache. It must be this engine's: kernels write where it says."""
        if cache.origin is not self._origin:
            raise OptionError("the cache is another model's; make one with this model's new_cache()")
        cache.reserve(tokens)

    def _logits(self, rows: int, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """`out`, checked, or a new array for this many rows of logits."""
        shape = rows, self.config.vocab_size
        if out is None:
            return self._new_logits(rows)
        if out.shape != shape or out.dtype != np.float32:
            raise OptionError(f"out is {out.dtype} {out.shape}; these logits are float32 {shape}")
        return out

    def _new_logits(self, rows: int) -> NDArray[np.float32]:
        # The buffers hold those of one chunk, too.
        size = 4 * self.config.vocab_size * (rows + min(rows, self.chunk))
        available = available_memory() if rows > self.chunk else None  # the query takes half a millisecond
        too_large = OutOfMemoryError(
            f"logits of {rows} tokens take {size / 1e9:.2f} GB, more than there is memory left; "
            "ask for those of fewer tokens at a time"
        )
        if available is not None and size > available - HEADROOM:
            raise too_large
        try:
            return np.empty((rows, self.config.vocab_size), np.float32)
        except MemoryError:  # a limit on the address space, or a system that does not overcommit
            raise too_large from None

    def _turn(self) -> threading.Lock:
        """The lock of the running pass. A forked process has its own: the holder's thread is not there."""
        return self._turns.setdefault(os.getpid(), threading.Lock())

    def _arguments(
        self, ids: NDArray[np.int64], cache: KVCache, rows: int, logits: NDArray[np.float32]
    ) -> tuple[Any, ...]:
        """The arguments of `npqwen.engine.forward.forward` after the team's state and the member."""
        return (
            self.weights.model[0],
            self.weights.layers,
            ids,
            cache.length,
            *self._rope.tables(cache.length, ids.size),
            cache.addresses,
            cache.dtype_array,
            self._buffers.shared,
            self._buffers.mixture,
            self._buffers.scratches,
            self._buffers.pieces,
            rows,
            logits,
        )

    def _check(self, ids: ArrayLike) -> NDArray[np.int64]:
        try:
            tokens = np.atleast_1d(ids)
        except ValueError:
            raise OptionError("token ids are one sequence of whole numbers, not sequences of sequences") from None
        if not tokens.size:
            raise OptionError("no tokens to run; give at least one")
        if tokens.ndim > 1:
            raise OptionError(f"token ids are one sequence, not an array of shape {tokens.shape}")
        if tokens.dtype.kind not in "iu":
            raise OptionError(f"token ids are whole numbers, not {tokens.dtype}; encode text with the tokenizer")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise OptionError(f"token id {wrong} is outside the model's 0 to {self.config.vocab_size - 1}")
        return np.ascontiguousarray(tokens, np.int64)

    def close(self) -> None:
        """Wait for the running pass, end the threads and unmap the files. Later calls raise ClosedError."""
        with self._turn():
            self._team.close()
            self.weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def chunk_size(config: Config) -> int:
    """Tokens of a prompt that one pass runs."""
    return CHUNK if config.mixture is None else SPARSE_CHUNK


def context_length(config: Config, requested: int | None) -> int:
    """Maximum tokens of a sequence: as requested, by default all that the model supports.

    Raises OptionError for a request beyond that.
    """
    most = config.max_position_embeddings
    if config.yarn is not None:
        most = max(most, int(config.yarn.factor * config.yarn.original_max_position_embeddings))
    if requested is None:
        return most
    if not isinstance(requested, int | np.integer) or isinstance(requested, bool) or not 0 < requested <= most:
        raise OptionError(f"context is {requested!r}; this model's is a whole number, 1 to {most} tokens")
    return int(requested)
