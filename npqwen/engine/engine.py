"""The engine: token ids in, logits out. It knows nothing of text, sampling or conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npqwen.checks import check_path, check_progress, check_whole
from npqwen.engine.adapters import Adapters, check_adapters
from npqwen.engine.arrays import ids_array, logits_array, results_array
from npqwen.engine.budget import Budget
from npqwen.engine.cache_type import CacheType, check_cache_type
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.draft_layer import DraftLayer
from npqwen.engine.fingerprint import fingerprint
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.pass_times import PassTimes
from npqwen.engine.piece import Piece, by_piece, caches_in_use, check_pieces, last_tokens, reserve
from npqwen.engine.prefix_files import DEFAULT_SIZE, PrefixFiles
from npqwen.engine.prefix_pool import check_prefix_options, new_pool
from npqwen.engine.prefixes import Prefixes
from npqwen.engine.records import Output
from npqwen.engine.recurrent_states import states_bytes
from npqwen.engine.runner import Runner
from npqwen.engine.team import check_threads
from npqwen.engine.weights import Weights
from npqwen.errors import ClosedError, ContextLengthError, OptionError
from npqwen.format.config import Config
from npqwen.format.encodings import UNIT_ROWS
from npqwen.hardware.machine import available_memory, default_threads
from npqwen.kernels.compile_events import reporting
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.matrix import read_row
from npqwen.kernels.paging import prefetch_policy

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

CHUNK = 256
"""Most tokens of a prompt that one pass runs."""
SPARSE_CHUNK = 512
"""Most tokens of a prompt that one pass of a mixture of experts runs: each expert sees only a part of them."""


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
        yarn: float | None = None,
        kv: CacheType | None = None,
        adapters: Mapping[str, Any] | None = None,
        prefix_cache: str | os.PathLike[str] | None = None,
        prefix_cache_size: int | None = None,
        prefix_memory: int | None = None,
        notice: Callable[[str], None] | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Map the converted directory `path`; see `npqwen.model.load` for the options and errors."""
        if threads is not None:
            check_threads(threads)
        chosen = None if kv is None else check_cache_type(kv)
        adapter_files = check_adapters(adapters)
        self._path = path
        self._config = with_yarn(Config.from_directory(path), yarn)
        self._context = context_length(self.config, context)
        weights = Weights(path, self.config)
        available = available_memory()
        exceeds_memory = available is not None and weights.nbytes > 0.9 * available
        if not exceeds_memory:
            weights.advise_huge_pages()
        weights.check_values()
        self._kv = chosen or weights.cache_type
        self._weight_bytes = weights.nbytes
        weights.model[0]["prefetch"] = prefetch_policy(weights.paths, exceeds_memory)
        self._threads = default_threads() if threads is None else int(threads)
        self._origin = object()
        self.chunk = chunk_size(self.config)
        self._runner = Runner(
            self.config,
            weights,
            Adapters(adapter_files, self.config),
            threads=self.threads,
            chunk=self.chunk,
            context=self.context,
            from_disk=exceeds_memory,
        )
        besides = None if available is None else available - self.weight_bytes
        self._prefixes = new_pool(prefix_memory, besides, self.config.recurrence is not None, notice)
        directory = None if prefix_cache is None else check_path(prefix_cache)
        cache, states = self.new_cache(1), states_bytes(self.config)
        Budget(self.weight_bytes, self._runner.nbytes, cache.page_bytes, available, states).check(context)
        check_prefix_options(directory, prefix_cache_size, prefix_memory, cache.page_bytes)
        if directory is not None:
            files = PrefixFiles(directory, prefix_cache_size or DEFAULT_SIZE, cache, self.fingerprint)
            self._prefixes.open(files, self._runner.is_busy)
        self._draft_layer: DraftLayer | None = None
        if len(weights.draft):
            evict = self.prefixes.evict_oldest
            self._draft_layer = DraftLayer(self._runner, self.context, self.kv, self.chunk, evict)
        with reporting(on_compile):
            self._compile()

    def _compile(self) -> None:
        """Load the kernels from disk, or compile them."""
        self._runner.compile(Piece(np.zeros(1, np.int64), self.new_cache(1), 1))
        if self._draft_layer is not None:
            self._draft_layer.compile()

    @property
    def path(self) -> Path:
        """The converted directory."""
        return self._path

    @property
    def config(self) -> Config:
        """The dimensions, from config.json."""
        return self._config

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt and its continuation together."""
        return self._context

    @property
    def weights(self) -> Weights:
        """The mapped files."""
        return self._runner.weights

    @property
    def passes(self) -> PassTimes:
        """Measured durations of passes of few tokens on this machine."""
        return self._runner.times

    @property
    def bits(self) -> int:
        """Bits per weight that the model was converted with."""
        return self.weights.bits

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the mapped weights."""
        return self._weight_bytes

    @property
    def kv(self) -> CacheType:
        """The element type of the KV cache."""
        return self._kv

    @property
    def prefixes(self) -> Prefixes:
        """The pool of cached prefixes: keys and values of earlier texts, for texts that begin alike."""
        return self._prefixes

    @property
    def draft_layer(self) -> DraftLayer | None:
        """The checkpoint's draft layer, which drafts tokens (multi-token prediction); None if it has none."""
        return self._draft_layer

    @property
    def adapters(self) -> Adapters:
        """The loaded LoRA adapters, by name."""
        return self._runner.adapters

    def with_weights(self, weights: Weights) -> Self:
        """An engine with other weights of the same padded sizes, sharing this one's threads, buffers, lock and caches.

        Closing this engine ends both: do not close the new one, nor use it after this one was closed.
        """
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("fingerprint", None)
        other._runner = self._runner.with_weights(weights)
        return other

    def new_cache(self, capacity: int | None = None, adapter: str | None = None) -> KVCache:
        """An empty cache for one sequence of up to `capacity` tokens (default: the context).

        adapter: the name of one of `adapters`, with which all its tokens are run. Raises OptionError for an unknown
        name, ContextLengthError for more than the context.
        """
        limit = self.context if capacity is None else check_whole("capacity", capacity, 1)
        if limit > self.context:
            raise ContextLengthError(f"a cache for {limit} tokens exceeds the model's context of {self.context}")
        chosen = None if adapter is None else self.adapters.find(adapter)
        return KVCache(self.config, limit, self.kv, self._origin, self.prefixes.evict_oldest, chosen)

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Run `ids` after the tokens in the cache, and append their keys and values to it.

        Returns float32 logits: (1, vocab_size) of the last token, or (tokens, vocab_size) with all_logits. If `out` is
        given, it receives them, which saves an allocation per token: it has the same shape, or (1, n), with n a
        multiple of 16, to compute only the logits of the ids below n. Inputs longer than `chunk` tokens run in chunks;
        after an interrupt the cache holds the completed chunks.

        Raises before computing: ContextLengthError and OutOfMemoryError; OptionError for ids outside the vocabulary,
        for another model's cache and for an `out` of the wrong shape or dtype.
        """
        tokens = ids_array(ids, self.config.vocab_size)
        return self._run(tokens, cache, tokens.size if all_logits else 1, out)

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Run a prompt after the tokens in the cache; float32 logits (vocab_size,) of its last token.

        progress(done, total) is called after every chunk. Raises what `forward` raises.
        """
        check_progress(progress)
        last: NDArray[np.float32] = self._run(ids_array(ids, self.config.vocab_size), cache, 1, progress=progress)[0]
        return last

    def logits(self, ids: ArrayLike, *, adapter: str | None = None) -> NDArray[np.float32]:
        """float32 logits (tokens, vocab_size) after every token of a text, run with one of `adapters` if it is named.

        Raises what `forward` and `new_cache` raise.
        """
        tokens = ids_array(ids, self.config.vocab_size)
        return self.forward(tokens, self.new_cache(min(tokens.size, self.context), adapter), all_logits=True)

    def hidden(
        self, ids: ArrayLike, layers: int | Sequence[int] = -1, *, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Hidden states of a text: float32 (tokens, hidden_size), or (len(layers), tokens, hidden_size) for a sequence.

        layers: indices as into the `hidden_states` of Hugging Face transformers, num_hidden_layers + 1 in number. 0 is
        the embedding; i is the output of the i-th layer, which the next one reads; the last, num_hidden_layers or -1,
        is the final norm's output, which the output matrix reads. Negative ones count from the end. Layers after the
        last one requested are not computed. adapter: the name of one of `adapters`.

        Raises OptionError for a layer out of range, and what `forward` and `new_cache` raise.
        """
        tokens = ids_array(ids, self.config.vocab_size)
        count = self.config.num_hidden_layers
        several = layers if isinstance(layers, Sequence | np.ndarray) else None
        indices = [layers] if several is None else several
        chosen = [check_whole("layers", i, -count - 1, count) % (count + 1) for i in indices]
        shape = len(chosen), tokens.size, self.config.hidden_size
        states = results_array(shape, "hidden states", tokens.size, self.chunk)
        cache = self.new_cache(min(tokens.size, self.context), adapter)
        cache.reserve(tokens.size)
        for start, end in self._chunks(tokens.size, cache):
            with self._runner.turn():
                found = self._runner.hidden_states(Piece(tokens[start:end], cache, 0), set(chosen))
            for i, state in zip(chosen, states, strict=True):
                state[start:end] = found[i]
        return states[0] if several is None else states

    @property
    def fingerprint(self) -> str:
        """A hash of the config and samples of the weights; see `npqwen.engine.fingerprint`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        self.weights.check_whole()
        return fingerprint(self.config, self.weights)

    def forward_pieces(
        self,
        pieces: Sequence[Piece],
        out: NDArray[np.float32] | None = None,
        maxima: NDArray[np.float32] | None = None,
    ) -> list[NDArray[np.float32]]:
        """One forward pass over pieces of several sequences, together at most `chunk` tokens.

        Returns for each piece float32 logits (rows, vocab_size), bitwise equal to those of a separate pass. out: an
        array from `new_logits` for at least as many rows; if given, the logits are views of it. maxima: float32 (at
        least as many rows, padded vocabulary // MAXIMA_BLOCK), receives each row's maximum of each whole block of
        MAXIMA_BLOCK logits, so that `npqwen.kernels.greatest` need not read all of them.

        Raises OptionError for another model's cache, for a cache in two pieces, for more tokens than a pass takes, for
        ids outside the vocabulary and for an `out` or `maxima` of the wrong shape or dtype;
        ContextLengthError and OutOfMemoryError as `KVCache.reserve` does.
        """
        count = sum(piece.rows for piece in pieces)
        self._check_pieces(pieces)
        self._runner.buffers.check_results(count, out, maxima)
        with caches_in_use(pieces), self._runner.turn():
            reserve(pieces)
            logits = self._runner.buffers.logits(count) if out is None else out
            output = Output(last_tokens(pieces), False, logits)
            self._runner.run_pieces(pieces, output if maxima is None else output._replace(maxima=maxima))
            found = logits[:count, : self.config.vocab_size]
            found = found.copy() if out is None else found
        return by_piece(found, pieces)

    def hidden_pieces(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """One forward pass over pieces of several sequences, together at most `chunk` tokens.

        Returns for each piece the final norm's output, float32 (rows, hidden_size), bitwise equal to that of a separate
        pass. Raises what `forward_pieces` raises.
        """
        count = sum(piece.rows for piece in pieces)
        self._check_pieces(pieces)
        states = np.empty((count, self.config.hidden_size), np.float32)
        with caches_in_use(pieces), self._runner.turn():
            reserve(pieces)
            self._runner.run_pieces(pieces, Output(last_tokens(pieces), True, states))
        return by_piece(states, pieces)

    def output_row(self, id: int) -> NDArray[np.float32]:
        """A token's row of the output matrix, float32 (hidden_size,).

        The token's logit is its dot product with a hidden state after the final norm.
        """
        check_whole("id", id, 0, self.config.vocab_size - 1)
        matrix = self.weights.model[0]["lm_head"]
        row = np.empty(int(matrix["cols"]), np.float32)
        compile_kernel(read_row, (matrix, 0, row))
        with self._runner.turn():  # nobody unmaps the weights meanwhile
            self._check_open()
            self.weights.check_whole()
            read_row(matrix, int(id), row)
        return row[: self.config.hidden_size]

    def new_logits(self, rows: int) -> NDArray[np.float32]:
        """An array for the logits of passes of up to this many rows, see `forward_pieces`."""
        return self._runner.buffers.new_logits(rows)

    def _check_pieces(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._check_origin(piece.cache)
        check_pieces(pieces, self.chunk, self.config.vocab_size)

    def _check_origin(self, cache: KVCache) -> None:
        if getattr(cache, "origin", None) is not self._origin:  # kernels write to a cache's addresses
            raise OptionError("the cache belongs to another model; make one with this model's new_cache()")

    def _run(
        self,
        tokens: NDArray[np.int64],
        cache: KVCache,
        rows: int,
        out: NDArray[np.float32] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Append the tokens to the cache, chunk by chunk; logits of the last `rows` of them, in `out` if given."""
        self._check_origin(cache)
        first = tokens.size - rows
        with cache.in_use:
            cache.reserve(tokens.size)
            out = logits_array(rows, self.config.vocab_size, self.chunk, out)
            for start, end in self._chunks(tokens.size, cache):
                self._pass(tokens[start:end], cache, out[max(0, start - first) : max(0, end - first)])
                if progress is not None:
                    progress(end, tokens.size)
        return out

    def _chunks(self, tokens: int, cache: KVCache) -> Iterator[tuple[int, int]]:
        """(start, end) of each pass over a text; the caller appends a pass's tokens to the cache before the next."""
        start = 0
        while start < tokens:
            end = start + cache.span(min(self.chunk, tokens - start))
            yield start, end
            start = end

    def _pass(self, ids: NDArray[np.int64], cache: KVCache, out: NDArray[np.float32]) -> None:
        """One forward pass of at most `chunk` tokens; `out` receives the logits of the last len(out) of them."""
        rows = len(out)
        pieces = [Piece(ids, cache, rows)]
        with self._runner.turn():
            logits = self._runner.buffers.logits(rows)
            # A single row is not padded to a tile: the kernels write it in place.
            direct = rows == 1 and out.shape[1] % UNIT_ROWS == 0 and out.flags.carray
            output = Output(last_tokens(pieces), False, out if direct else logits)
            self._runner.run_pieces(pieces, output)
            if not direct:
                out[:] = logits[:rows, : out.shape[1]]

    def close(self) -> None:
        """Wait for the running pass, end the threads and unmap the files. Later calls raise ClosedError.

        Prefixes that are not yet in the prefix cache's directory are written.
        """
        self._runner.close()
        self.prefixes.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self.weights.tensors

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the model is closed; load it again")

    def __enter__(self) -> Self:
        """The model itself. Raises ClosedError if it was closed."""
        self._check_open()
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model cannot be pickled or copied: load it in each process, and share it among threads")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def chunk_size(config: Config) -> int:
    """Most tokens of a prompt that one pass runs."""
    return CHUNK if config.mixture is None else SPARSE_CHUNK
