"""Forward passes, one at a time: their arguments, and the threads that compute them."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.buffers import Buffers
from npqwen.engine.forward import forward
from npqwen.engine.pass_times import PassTimes
from npqwen.engine.records import Output, Tokens
from npqwen.engine.rope import Rope
from npqwen.engine.team import Team
from npqwen.kernels.append import append_kernels
from npqwen.kernels.attention import SEQUENCE, attention_kernels
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.gated_delta import gated_delta_kernel
from npqwen.kernels.matmul import matmul_kernels

if TYPE_CHECKING:
    from typing_extensions import Self

    from npqwen.engine.adapters import Adapters
    from npqwen.engine.piece import Piece
    from npqwen.engine.weights import Weights
    from npqwen.format.config import Config

PROMPT_TOKENS = 64
"""Fewest tokens of a piece that counts as a long part of a prompt; a pass of such pieces may be computed in bf16."""
SHORT_PASS = 4
"""Most tokens of a pass that the main thread, if it is the caller, helps compute: Ctrl-C waits until the pass ends."""
_NO_STATES = (0,) * 6
"""The fields of SEQUENCE starting at `draft_tokens`, without recurrent layers."""


class Runner:
    """Runs passes of a model on a team of threads that `close` ends; callers hold the lock `turn()` during a pass."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        adapters: Adapters,
        *,
        threads: int,
        chunk: int,
        context: int,
        from_disk: bool,
    ) -> None:
        """chunk: the most tokens of a pass. context: the most of a sequence. from_disk: whether memory is too small for
        the weights, so every pass is slow."""
        self.config, self.weights, self.adapters = config, weights, adapters
        self.team = Team(threads)
        # A runner that is not closed ends its threads when it is garbage-collected; at exit they are daemons.
        weakref.finalize(self, self.team.close).atexit = False
        self.buffers = Buffers(config, weights, threads, chunk, context, rank=adapters.rank)
        self.nbytes = self.buffers.nbytes + adapters.nbytes + adapters.prepare(config, self.buffers)
        """Most bytes that passes write, plus those of the adapters."""
        self.times = PassTimes(sparse=config.mixture is not None)
        """Measured durations of passes of few tokens on this machine."""
        self._from_disk = from_disk
        self._rope = Rope(config)
        self._rows = np.arange(chunk, dtype=np.int64)  # int32 on Windows with NumPy 1
        self._turns: dict[int, threading.Lock] = {}

    def with_weights(self, weights: Weights) -> Self:
        """A runner of other weights of the same padded sizes, with the same threads, buffers and lock."""
        other = copy(self)
        other.weights = weights
        return other

    def compile(self, piece: Piece) -> None:
        """Load the kernels from disk, or compile them. piece: a token with an empty cache; it is not run."""
        model, cache = self.weights.model[0], piece.cache
        cache.begin(1)
        output = Output(np.zeros(1, np.int64), False, self.buffers.logits(1))
        # First, as it takes longest: another process may compile the other kernels meanwhile.
        self.compile_function(forward, self._arguments([piece], self.weights.layers, True, output))
        model["matmul_kernels"] = matmul_kernels(self.weights.encodings)
        model["attention_kernels"] = attention_kernels(cache.page_dtype)
        model["append_kernels"] = append_kernels(cache.page_dtype)
        model["cache_is_int8"] = cache.page_dtype == np.uint8
        if cache.recurrent is not None:
            model["gated_delta_kernel"] = gated_delta_kernel()

    def compile_function(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Load or compile a function of the team for arguments like these; see `run`."""
        compile_kernel(function, (self.team.row(0), 0, *arguments))

    def turn(self) -> threading.Lock:
        """The lock of the running pass. A forked process has its own: the holder's thread does not exist there."""
        return self._turns.setdefault(os.getpid(), threading.Lock())

    def is_busy(self) -> bool:
        """Whether a pass runs."""
        return self.turn().locked()

    def run(self, function: Callable[..., None], tokens: int, *arguments: Any, keep: object = None) -> None:
        """Run function(row, member, *arguments) on the team, for this many tokens; see `Team.run`.

        Raises FormatError if a file has become shorter, and what `Team.run` raises.
        """
        self.weights.check_whole()
        # Ctrl-C reaches the main thread only. Reading weights that do not fit into memory from disk takes long.
        is_short = tokens <= SHORT_PASS and not self._from_disk
        on_caller = is_short or threading.current_thread() is not threading.main_thread()
        self.team.run(function, *arguments, on_caller=on_caller, keep=keep)

    def forward(
        self,
        pieces: Sequence[Piece],
        layers: NDArray[np.void],
        embed: bool,
        output: Output,
        model: NDArray[np.void] | None = None,
    ) -> None:
        """Run pieces, whose caches are prepared, through some layers, and append nothing.

        embed: begin with the embedding, otherwise with the hidden states in `buffers`. model: a MODEL record to use in
        place of the weights' own.
        """
        arguments, held = self._arguments(pieces, layers, embed, output, model), [piece.cache.held for piece in pieces]
        self.run(forward, sum(piece.ids.size for piece in pieces), *arguments, keep=held)

    def run_pieces(self, pieces: Sequence[Piece], output: Output) -> None:
        """Run pieces through all layers, append them to their caches, and add their hidden states to `KVCache.tail`."""
        for piece in pieces:
            piece.cache.begin(piece.ids.size, piece.draft_tokens)
        start = time.perf_counter()
        self.forward(pieces, self.weights.layers, True, output)
        tokens = sum(piece.ids.size for piece in pieces)
        if not output.normed and len(output.tokens) == tokens:
            self.times.add(tokens, time.perf_counter() - start)
        hidden, first = self.buffers.activations.hidden[:, : self.config.hidden_size], 0
        for piece in pieces:
            cache, last = piece.cache, first + piece.ids.size
            if cache.tail is not None:
                cache.tail.add(cache.length, hidden[first:last])
            cache.advance(piece.ids.size)
            first = last

    def hidden_states(self, piece: Piece, chosen: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """Run a piece through as many layers as necessary and append it to its cache.

        chosen: numbers of layers. Returns, by these, the hidden states after that many layers, float32 (tokens,
        hidden_size). Those after all layers are the final norm's output.
        """
        count, size, last = piece.ids.size, self.config.hidden_size, self.config.num_hidden_layers
        found: dict[int, NDArray[np.float32]] = {}
        done = 0
        piece.cache.begin(count)
        for i in sorted(chosen):
            normed = np.empty((count if i == last else 0, size), np.float32)
            output = Output(self._rows[: len(normed)], True, normed)
            self.forward([piece], self.weights.layers[done:i], not found, output)
            found[i] = normed if i == last else self.buffers.activations.hidden[:count, :size].copy()
            done = i
        piece.cache.advance(count)
        return found

    def _arguments(
        self,
        pieces: Sequence[Piece],
        layers: NDArray[np.void],
        embed: bool,
        output: Output,
        model: NDArray[np.void] | None = None,
    ) -> tuple[Any, ...]:
        """The arguments of `npqwen.engine.forward.forward` after the member's row and number."""
        buffers = self.buffers
        records = np.zeros(len(pieces), SEQUENCE)
        first = 0
        for i, piece in enumerate(pieces):
            ids, cache = piece.ids, piece.cache
            state_fields = _NO_STATES if cache.recurrent is None else cache.recurrent.fields
            records[i] = first, ids.size, cache.length, cache.page_table, *state_fields
            first += ids.size
        rows = self._rows[:first]
        # Vectors of texts do not depend, to the bit, on what they are packed with, nor do verified draft tokens.
        is_prompt = not output.normed and all(
            piece.ids.size >= PROMPT_TOKENS and piece.draft_tokens == 0 for piece in pieces
        )
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
            Tokens(ids, rows, embed, positions, is_prompt, pages, cos, sin),
            records,
            buffers.activations,
            buffers.experts,
            buffers.recurrent,
            self.adapters.of_pass([(piece.cache.adapter, piece.ids.size) for piece in pieces]),
            buffers.workspace,
            output,
        )

    def close(self) -> None:
        """Wait for the running pass, end the threads and unmap the weights."""
        with self.turn():
            self.team.close()
            self.weights.close()
