"""The engine: token ids in, logits out. It knows nothing of text, sampling or conversations."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npqwen.checks import check_progress, check_whole
from npqwen.engine.adapters import Adapters, check_adapters
from npqwen.engine.arrays import checked_ids, logits_array, results_array
from npqwen.engine.budget import Budget
from npqwen.engine.buffers import Buffers
from npqwen.engine.cache_type import CacheType, check_cache_type
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.draft_input import draft_input
from npqwen.engine.fingerprint import fingerprint
from npqwen.engine.forward import forward
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.pass_times import PassTimes
from npqwen.engine.piece import Piece, by_piece, last_tokens
from npqwen.engine.prefix_files import DEFAULT_SIZE, PrefixFiles
from npqwen.engine.prefixes import Prefixes
from npqwen.engine.records import Output, Sequences, Tokens
from npqwen.engine.recurrent_states import states_bytes
from npqwen.engine.rope import Rope
from npqwen.engine.team import Team, check_threads
from npqwen.engine.weights import Weights
from npqwen.errors import ClosedError, ContextLengthError, OptionError
from npqwen.format.config import Config
from npqwen.format.encodings import UNIT_ROWS
from npqwen.hardware.machine import available_memory, default_threads
from npqwen.kernels.attention import SEQUENCE, attention_kernels
from npqwen.kernels.compiled import compile_kernel, reporting
from npqwen.kernels.gated_delta import gated_delta_kernel
from npqwen.kernels.matmul import matmul_kernels
from npqwen.kernels.matrix import read_row
from npqwen.kernels.paging import prefetch_policy

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 256
"""Tokens of a prompt that one pass runs."""
SPARSE_CHUNK = 512
"""Tokens of a prompt that one pass of a mixture of experts runs: each expert sees only a part of them."""
SHORT_PASS = 4
"""Passes of at most this many tokens run on the calling thread too: Ctrl-C can wait that long."""


_NO_STATES = (0,) * 6
"""The fields of SEQUENCE from `guesses` on, without recurrent layers."""

PREFIX_MEMORY = 4 << 30
"""Bytes of prefixes that are kept in memory at most by default, and at most a quarter of what is available."""


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
        prefix_cache: Path | None = None,
        prefix_cache_size: int | None = None,
        prefix_memory: int | None = None,
        notice: Callable[[str], None] | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Map the converted directory `path`; see `npqwen.model.load` for the options and errors."""
        if threads is not None:
            check_threads(threads)
        chosen = None if kv is None else check_cache_type(kv)
        files = check_adapters(adapters)
        self._path = path
        self._config = with_yarn(Config.from_directory(path), yarn)
        self._context = context_length(self.config, context)
        self.weights = Weights(path, self.config)
        available = available_memory()
        self._exceeds_memory = available is not None and self.weights.nbytes > 0.9 * available
        if not self._exceeds_memory:
            self.weights.advise_huge_pages()
        self.weights.check_codebooks()
        self._kv = chosen or self.weights.cache_type
        self._weight_bytes = self.weights.nbytes
        is_recurrent = [self.config.is_recurrent(layer) for layer in range(self.config.num_hidden_layers)]
        self.weights.layers["kv_index"] = np.cumsum(np.logical_not(is_recurrent)) - 1
        self.weights.layers["state_index"] = np.cumsum(is_recurrent) - 1
        self.weights.model[0]["prefetch"] = prefetch_policy(self.weights.paths, self._exceeds_memory)
        self._threads = default_threads() if threads is None else int(threads)
        self._origin, self._draft_origin = object(), object()
        self._prefixes = Prefixes(0)
        self._rope = Rope(self.config)
        self._team = Team(self.threads)
        # An engine that nobody closed ends its threads when it is collected; at exit they are daemons.
        weakref.finalize(self, self._team.close).atexit = False
        self.chunk = chunk_size(self.config)
        self._adapters = Adapters(files, self.config)
        rank = self.adapters.rank
        self._buffers = Buffers(self.config, self.weights, self.threads, self.chunk, self.context, rank=rank)
        beside = self.adapters.nbytes + self.adapters.prepare(self.config, self._buffers)
        self._rows = np.arange(self.chunk)
        self.passes = PassTimes(sparse=self.config.mixture is not None)
        """What passes of few tokens take here."""
        page = self.new_cache(1).page_bytes
        working = self._buffers.nbytes + beside
        Budget(self.weight_bytes, working, page, available, states_bytes(self.config)).check(context)
        self._turns: dict[int, threading.Lock] = {}
        self._prefixes = self._new_prefixes(prefix_cache, prefix_cache_size, prefix_memory, notice, available)
        with reporting(on_compile):
            self._compile()

    def _new_prefixes(
        self,
        directory: Path | None,
        most: int | None,
        memory: int | None,
        notice: Callable[[str], None] | None,
        available: int | None,
    ) -> Prefixes:
        """The pool of prefixes; see `npqwen.model.load` for the options. available: bytes of memory."""
        files = None
        if directory is not None:
            limit = DEFAULT_SIZE if most is None else check_whole("prefix_cache_size", most, 1)
            files = PrefixFiles(directory, limit, self.new_cache(1), self.fingerprint)
        elif most is not None:
            raise OptionError("prefix_cache_size has no effect without prefix_cache; give the directory, too")
        if memory is not None:
            check_whole("prefix_memory", memory)
            if files is not None and memory < files.page_bytes:
                raise OptionError(
                    f"prefix_memory is {memory}; with prefix_cache it must be at least {files.page_bytes}, one page"
                )
        turns = self._turns
        left = PREFIX_MEMORY if available is None else max(0, available - self.weight_bytes) // 4
        return Prefixes(
            min(PREFIX_MEMORY, left) if memory is None else memory,
            recurrent=self.config.recurrence is not None,
            adjustable=memory is None,
            files=files,
            busy=lambda: any(turn.locked() for turn in turns.values()),
            notice=notice,
        )

    def _compile(self) -> None:
        """Load the kernels from disk, or compile them."""
        cache = self.new_cache(1)
        model = self.weights.model[0]
        model["matmul_kernels"] = matmul_kernels(self.weights.encodings)
        model["attention_kernels"] = attention_kernels(cache.dtype_array.dtype)
        if cache.recurrent is not None:
            model["gated_delta_kernel"] = gated_delta_kernel()
        output = Output(np.zeros(1, np.int64), False, self._buffers.logits(1))
        cache.begin(1)
        sample = self._arguments([Piece(np.zeros(1, np.int64), cache, 1)], self.weights.layers, True, output)
        compile_kernel(forward, (self._team.row(0), 0, *sample))
        if self.has_draft_layer:
            self._draft_model = self.weights.model.copy()
            self._draft_model["norm"] = self.weights.draft["norm"]
            states = np.zeros((1, self.config.hidden_size), np.float32)
            compile_kernel(
                draft_input, (self._team.row(0), 0, *self._draft_arguments(0, np.zeros(1, np.int64), states))
            )

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
        """The type of the numbers in the KV cache."""
        return self._kv

    @property
    def prefixes(self) -> Prefixes:
        """Keys and values of texts so far, for texts that begin alike."""
        return self._prefixes

    @property
    def has_draft_layer(self) -> bool:
        """Whether the checkpoint has a layer of its own that guesses tokens (multi-token prediction)."""
        return len(self.weights.draft) > 0

    @property
    def draft_share(self) -> float:
        """Bytes of weights that `run_draft_layer` reads for a token and half the vocabulary, in those of a pass."""
        mixture, tensors = self.config.mixture, self.weights.tensors
        chosen = 1.0 if mixture is None else mixture.num_experts_per_tok / mixture.num_experts
        read = {name: one.data.size * (chosen if ".experts." in name else 1) for name, one in tensors.items()}
        own = sum(size for name, size in read.items() if name.startswith("mtp."))
        embedding = read["model.embed_tokens.weight"]
        output = read.get("lm_head.weight", embedding)
        others = sum(read.values()) - own - (embedding if "lm_head.weight" in read else 0)
        return float((own + output / 2) / others)

    def new_draft_cache(self) -> KVCache:
        """An empty cache for the keys and values of the draft layer, see `run_draft_layer`."""
        config = replace(self.config, num_hidden_layers=1, recurrence=None)
        return KVCache(config, self.context, self.kv, self._draft_origin, self.prefixes.drop_oldest)

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that texts can choose from, by name."""
        return self._adapters

    def new_cache(self, room: int | None = None, adapter: str | None = None) -> KVCache:
        """An empty cache for one sequence of up to `room` tokens (default: the context).

        adapter: the name of one of `adapters`, with which all its tokens are run. Raises OptionError if there is none,
        ContextLengthError for more room than the context.
        """
        limit = self.context if room is None else check_whole("room", room, 1)
        if limit > self.context:
            raise ContextLengthError(f"a cache for {limit} tokens exceeds the model's context of {self.context}")
        chosen = None if adapter is None else self.adapters.find(adapter)
        return KVCache(self.config, limit, self.kv, self._origin, self.prefixes.drop_oldest, chosen)

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Run `ids` after the tokens in the cache, and append their keys and values to it.

        Returns float32 logits: (1, vocab_size) of the last token, or (tokens, vocab_size) with all_logits. `out`, of
        the same shape, receives them if given, which saves allocating them for every token; of shape (1, n), with n a
        multiple of 16, it receives those of the ids below n, and the others are not computed. Inputs longer than
        `chunk` tokens run in chunks; after an interrupt the cache holds the chunks that were completed.

        Raises before computing: ContextLengthError and OutOfMemoryError; OptionError for ids outside the vocabulary,
        for another model's cache and for an `out` of the wrong shape or dtype.
        """
        tokens = checked_ids(ids, self.config.vocab_size)
        return self._run(tokens, cache, tokens.size if all_logits else 1, out)

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Run a prompt after the tokens in the cache; float32 logits (vocab_size,) of its last token.

        progress(done, total) is called after every chunk. Raises what `forward` raises.
        """
        check_progress(progress)
        last: NDArray[np.float32] = self._run(checked_ids(ids, self.config.vocab_size), cache, 1, progress=progress)[0]
        return last

    def logits(self, ids: ArrayLike, *, adapter: str | None = None) -> NDArray[np.float32]:
        """float32 logits (tokens, vocab_size) after every token of a text, run with one of `adapters` if it is named.

        Raises what `forward` and `new_cache` raise.
        """
        tokens = checked_ids(ids, self.config.vocab_size)
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
        tokens = checked_ids(ids, self.config.vocab_size)
        count = self.config.num_hidden_layers
        several = layers if isinstance(layers, Sequence | np.ndarray) else None
        indices = [layers] if several is None else several
        chosen = [check_whole("layers", i, -count - 1, count) % (count + 1) for i in indices]
        shape = len(chosen), tokens.size, self.config.hidden_size
        states = results_array(shape, "hidden states", tokens.size, self.chunk)
        cache = self.new_cache(min(tokens.size, self.context), adapter)
        cache.reserve(tokens.size)
        for start, end in self._chunks(tokens.size, cache):
            self._hidden_pass(tokens[start:end], cache, chosen, states[:, start:end])
        return states[0] if several is None else states

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config and samples of the weights; see `npqwen.engine.fingerprint`."""
        return fingerprint(self.config, self.weights)

    def forward_pieces(
        self, pieces: Sequence[Piece], out: NDArray[np.float32] | None = None
    ) -> list[NDArray[np.float32]]:
        """One forward pass over pieces of several sequences, together at most `chunk` tokens.

        Returns for each piece float32 logits (rows, vocab_size), equal to the bit to those of a pass of its own. They
        are views of `out` if it is given, an array that `new_logits` made for at least as many rows.

        Raises OptionError for another model's cache, for a cache in two pieces, and for more tokens than a pass takes.
        """
        count = sum(piece.rows for piece in pieces)
        self._check_pieces(pieces, count, out)
        with self._caches_in_use(pieces), self._turn():
            logits = self._buffers.logits(count) if out is None else out
            self._pieces_pass(pieces, Output(last_tokens(pieces), False, logits))
            found = logits[:count, : self.config.vocab_size]
            found = found.copy() if out is None else found
        return by_piece(found, pieces)

    def hidden_pieces(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """One forward pass over pieces of several sequences, together at most `chunk` tokens.

        Returns for each piece the final norm's output, float32 (rows, hidden_size), equal to the bit to that of a pass
        of its own. Raises what `forward_pieces` raises.
        """
        count = sum(piece.rows for piece in pieces)
        self._check_pieces(pieces, count, None)
        states = np.empty((count, self.config.hidden_size), np.float32)
        with self._caches_in_use(pieces), self._turn():
            self._pieces_pass(pieces, Output(last_tokens(pieces), True, states))
        return by_piece(states, pieces)

    def run_draft_layer(
        self,
        ids: ArrayLike,
        states: NDArray[np.float32],
        cache: KVCache,
        out: NDArray[np.float32],
        *,
        normed: bool = False,
        chained: bool = False,
    ) -> NDArray[np.float32]:
        """Guess the token after `ids` with the draft layer; its keys and values are appended to the cache.

        ids: up to `chunk` tokens of a text, one after the other, that follow those in the cache. states: float32
        (tokens, hidden_size), for each of them the hidden state of the token *before* it: the model's last layer's, see
        `KVCache.tail`; or if `chained`, what this returned for the token before, which was a guess. normed: apply the
        final norm of whoever made the states, the model's or the draft layer's, before they are used. cache: of
        `new_draft_cache`; its first token may be anywhere in the text, since only distances matter. out: float32
        (1, n) with n a multiple of 16, receives logits of the ids below n after the last token.

        Returns the layer's hidden state of the last token, float32 (hidden_size,), before its norm.
        """
        tokens, size = checked_ids(ids, self.config.vocab_size), self.config.hidden_size
        if not self.has_draft_layer:
            raise OptionError(f"{self.path} has no draft layer")
        if cache.origin is not self._draft_origin:
            raise OptionError("the cache belongs to another model; make one with this model's new_draft_cache()")
        if tokens.size > self.chunk or states.shape != (tokens.size, size) or states.dtype != np.float32:
            raise OptionError(f"states must be float32 {(tokens.size, size)}, and at most {self.chunk} at a time")
        if out.ndim != 2 or out.shape[1] % UNIT_ROWS or not out.flags.carray or out.dtype != np.float32:
            raise OptionError(f"out must be a writable float32 array (1, n), n a multiple of {UNIT_ROWS}")
        norm = 0
        if normed:
            norm = int((self.weights.draft if chained else self.weights.model)["norm"][0])
        pieces = [Piece(tokens, cache, 1)]
        with cache.in_use:
            cache.reserve(tokens.size)
            with self._turn():
                self.weights.check_whole()
                on_caller = self._on_caller(tokens.size)
                arguments = self._draft_arguments(norm, tokens, np.ascontiguousarray(states))
                self._team.run(draft_input, *arguments, on_caller=on_caller)
                output = Output(last_tokens(pieces), False, out)
                arguments = self._arguments(pieces, self.weights.draft_layers, False, output, self._draft_model)
                self._team.run(forward, *arguments, on_caller=on_caller, keep=cache.held)
                cache.advance(tokens.size)
                last: NDArray[np.float32] = self._buffers.activations.hidden[tokens.size - 1, :size].copy()
                return last

    def _draft_arguments(self, norm: int, ids: NDArray[np.int64], states: NDArray[np.float32]) -> tuple[Any, ...]:
        """The arguments of `draft_input` after the member's row and number."""
        buffers, weights = self._buffers, self.weights
        return weights.model[0], weights.draft[0], norm, ids, states, buffers.activations, buffers.workspace

    def output_row(self, id: int) -> NDArray[np.float32]:
        """A token's row of the output matrix, float32 (hidden_size,).

        The token's logit is its product with a hidden state that the final norm has left.
        """
        check_whole("id", id, 0, self.config.vocab_size - 1)
        matrix = self.weights.model[0]["lm_head"]
        row = np.empty(int(matrix["cols"]), np.float32)
        compile_kernel(read_row, (matrix, 0, row))
        with self._turn():  # nobody unmaps the weights meanwhile
            if not self.weights.tensors:
                raise ClosedError("the model is closed; load it again")
            read_row(matrix, int(id), row)
        return row[: self.config.hidden_size]

    @contextmanager
    def _caches_in_use(self, pieces: Sequence[Piece]) -> Iterator[None]:
        with ExitStack() as in_use:
            for piece in pieces:
                in_use.enter_context(piece.cache.in_use)
            yield

    def _pieces_pass(self, pieces: Sequence[Piece], output: Output) -> None:
        """Run pieces through all layers and append them to their caches, in the caller's turn."""
        for piece in pieces:
            piece.cache.begin(piece.ids.size, piece.guesses)
        self._forward(pieces, self.weights.layers, True, output)
        self._advance(pieces)

    def _advance(self, pieces: Sequence[Piece]) -> None:
        """Append the tokens of a complete pass to their caches, and hand over their hidden states."""
        hidden, first = self._buffers.activations.hidden[:, : self.config.hidden_size], 0
        for piece in pieces:
            cache, last = piece.cache, first + piece.ids.size
            if cache.tail is not None:
                cache.tail.add(cache.length, hidden[first:last])
            cache.advance(piece.ids.size)
            first = last

    def new_logits(self, rows: int) -> NDArray[np.float32]:
        """An array for the logits of passes of up to this many rows, see `forward_pieces`."""
        return self._buffers.new_logits(rows)

    def _check_pieces(self, pieces: Sequence[Piece], rows: int, out: NDArray[np.float32] | None) -> None:
        for piece in pieces:
            self._check_origin(piece.cache)
        if len({id(piece.cache) for piece in pieces}) < len(pieces):
            raise OptionError("two pieces of a pass have the same cache; each sequence needs its own, such as a fork")
        tokens = sum(piece.ids.size for piece in pieces)
        if not 0 < tokens <= self.chunk or not all(piece.ids.size for piece in pieces):
            raise OptionError(f"a pass takes 1 to {self.chunk} tokens, and some of each sequence; these are {tokens}")
        if out is not None and out.shape[0] < self._buffers.padded_rows(rows):
            raise OptionError(f"out has {len(out)} rows, too few for logits of {rows} tokens; see new_logits")

    def _check_origin(self, cache: KVCache) -> None:
        if getattr(cache, "origin", None) is not self._origin:  # kernels write where a cache says
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
        """(start, end) of each pass over a text, whose tokens are appended to the cache meanwhile."""
        start = 0
        while start < tokens:
            end = start + cache.span(min(self.chunk, tokens - start))
            yield start, end
            start = end

    def _pass(self, ids: NDArray[np.int64], cache: KVCache, out: NDArray[np.float32]) -> None:
        """One forward pass of at most `chunk` tokens; `out` receives the logits of the last len(out) of them."""
        rows = len(out)
        pieces = [Piece(ids, cache, rows)]
        with self._turn():
            logits = self._buffers.logits(rows)
            # A single row is not padded to a tile: the kernels write it in place.
            direct = rows == 1 and out.shape[1] % UNIT_ROWS == 0 and out.flags.carray
            output = Output(last_tokens(pieces), False, out if direct else logits)
            self._pieces_pass(pieces, output)
            if not direct:
                out[:] = logits[:rows, : out.shape[1]]

    def _hidden_pass(
        self, ids: NDArray[np.int64], cache: KVCache, chosen: list[int], states: NDArray[np.float32]
    ) -> None:
        """One forward pass; states (len(chosen), tokens, hidden_size) receives the chosen hidden states."""
        found: dict[int, NDArray[np.float32]] = {}
        last = self.config.num_hidden_layers
        pieces = [Piece(ids, cache, 0)]
        with self._turn():
            done = 0
            cache.begin(ids.size)
            for i in sorted(set(chosen)):
                normed = np.empty((ids.size if i == last else 0, self.config.hidden_size), np.float32)
                output = Output(self._rows[: len(normed)], True, normed)
                self._forward(pieces, self.weights.layers[done:i], not found, output)
                hidden = self._buffers.activations.hidden[: ids.size, : self.config.hidden_size]
                found[i] = normed if i == last else hidden.copy()
                done = i
            cache.advance(ids.size)
        for state, i in zip(states, chosen, strict=True):
            state[:] = found[i]

    def _forward(self, pieces: Sequence[Piece], layers: NDArray[np.void], embed: bool, output: Output) -> None:
        """Run some layers on the team of threads, in the caller's turn."""
        self.weights.check_whole()
        on_caller = self._on_caller(sum(piece.ids.size for piece in pieces))
        arguments, held = self._arguments(pieces, layers, embed, output), [piece.cache.held for piece in pieces]
        start = time.perf_counter()
        self._team.run(forward, *arguments, on_caller=on_caller, keep=held)
        if not output.normed and len(output.tokens) == sum(piece.ids.size for piece in pieces):
            self.passes.add(len(output.tokens), time.perf_counter() - start)

    def _on_caller(self, tokens: int) -> bool:
        """Whether the calling thread takes part in a pass of `tokens` tokens."""
        # Ctrl-C reaches the main thread only. Weights that do not fit into memory are read from disk: then no pass is
        # short.
        is_short = tokens <= SHORT_PASS and not self._exceeds_memory
        return is_short or threading.current_thread() is not threading.main_thread()

    def _arguments(
        self,
        pieces: Sequence[Piece],
        layers: NDArray[np.void],
        embed: bool,
        output: Output,
        model: NDArray[np.void] | None = None,
    ) -> tuple[Any, ...]:
        """The arguments of `npqwen.engine.forward.forward` after the member's row and number.

        model: a MODEL record to be used in place of the weights' own.
        """
        buffers = self._buffers
        records = np.zeros(len(pieces), SEQUENCE)
        first = 0
        for i, piece in enumerate(pieces):
            ids, cache = piece.ids, piece.cache
            of_states = _NO_STATES if cache.recurrent is None else cache.recurrent.fields
            records[i] = first, ids.size, cache.length, cache.page_table, *of_states
            first += ids.size
        rows = self._rows[:first]
        if len(pieces) == 1:
            ids, start = pieces[0].ids, pieces[0].cache.length
            positions, pages = rows + start, np.full(first, records["pages"][0])
            cos, sin = self._rope.tables(start, first)
        else:
            counts = records["tokens"]
            ids = np.concatenate([piece.ids for piece in pieces])
            positions = rows + np.repeat(records["start"] - records["first"], counts)
            pages = np.repeat(records["pages"], counts)
            cos, sin = self._rope.at(positions)
        return (
            (self.weights.model if model is None else model)[0],
            layers,
            Tokens(ids, rows, embed, positions, pages, cos, sin),
            Sequences(records, pieces[0].cache.dtype_array),
            buffers.activations,
            buffers.experts,
            buffers.recurrent,
            self.adapters.of_pass([(piece.cache.adapter, piece.ids.size) for piece in pieces]),
            buffers.workspace,
            output,
        )

    def _turn(self) -> threading.Lock:
        """The lock of the running pass. A forked process has its own: the holder's thread is not there."""
        return self._turns.setdefault(os.getpid(), threading.Lock())

    def close(self) -> None:
        """Wait for the running pass, end the threads and unmap the files. Later calls raise ClosedError.

        Prefixes that are not yet in the prefix cache's directory are written.
        """
        with self._turn():
            self._team.close()
            self.weights.close()
        self.prefixes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def chunk_size(config: Config) -> int:
    """Tokens of a prompt that one pass runs."""
    return CHUNK if config.mixture is None else SPARSE_CHUNK
