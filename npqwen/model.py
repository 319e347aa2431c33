"""A loaded model: tokens in, logits out."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

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
from npqwen.errors import ContextLengthError, NpqwenError, OptionError, OutOfMemoryError
from npqwen.format.config import Config
from npqwen.generation import generate as text
from npqwen.generation.completion import Completion
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.sampler import greatest
from npqwen.generation.stream import Stream
from npqwen.hardware.machine import HEADROOM, available_memory, default_threads
from npqwen.kernels.attention import attention_kernels
from npqwen.kernels.compiled import compile_kernel, reporting
from npqwen.kernels.matmul import matmul_kernels
from npqwen.kernels.paging import prefetch_policy
from npqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from npqwen.chat.answer import ChatStream, Reply
    from npqwen.chat.chat_template import ChatTemplate
    from npqwen.chat.conversation import Conversation

CHUNK = 256
"""Tokens of a prompt that go through the layers together."""
SPARSE_CHUNK = 512
"""The same for a mixture of experts: each expert gets but a part of them."""
FEW = 4
"""Tokens that are soon done: the calling thread computes too."""


class Model:
    """A converted Qwen3 model, mapped into memory.

    Use it from any number of threads: one forward pass runs at a time, on all of the model's own threads, the
    others wait.  Close it, or use it in a `with` statement, to end those threads and unmap the files.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Map the converted directory `path`; see `load`."""
        if threads is not None:
            check_threads(threads)
        with ThreadPoolExecutor(1) as reader:
            # A real tokenizer takes as long to read as all the rest: they go on side by side.
            tokenizer = reader.submit(Tokenizer.from_directory, path)
            self._open(path, threads, context, on_compile)
            try:
                self.tokenizer = tokenizer.result()
            except NpqwenError:
                self.close()
                raise

    def _open(
        self, path: Path, threads: int | None, context: int | None, on_compile: Callable[[int, int], None] | None
    ) -> None:
        self.path = path
        self.config = Config.from_directory(path)
        self.context = context_of(self.config, context)
        """Tokens that a prompt and its continuation may have together."""
        self.weights = Weights(path, self.config)
        self.weight_bytes = self.weights.nbytes
        """Bytes of the mapped weights."""
        available = available_memory()
        self._short = available is not None and self.weight_bytes > 0.9 * available
        if not self._short:
            self.weights.advise_huge_pages()
        self.weights.model[0]["prefetch"] = prefetch_policy(self.weights.paths, self._short)
        self.bits = self.weights.bits
        self.cache_dtype = cache_dtype(self.bits)
        self.generation = GenerationConfig.from_directory(path)
        self.threads = default_threads() if threads is None else int(threads)
        self._origin = object()
        self._rope = Rope(self.config)
        self._team = Team(self.threads)
        # The threads of a model that nobody closed end with it; at exit they are daemons.
        weakref.finalize(self, self._team.close).atexit = False
        self.chunk = chunk_of(self.config)
        self._buffers = Buffers(self.config, self.weights, self.threads, self.chunk)
        page = self.new_cache(1).page_bytes
        Budget(self.weight_bytes, self._buffers.nbytes, page, available).check(context)
        self._turns: dict[int, threading.Lock] = {}
        with reporting(on_compile):
            self._compile()

    def _compile(self) -> None:
        cache = self.new_cache(1)
        model = self.weights.model[0]
        model["matmul_kernels"] = matmul_kernels(self.weights.encodings)
        model["attention_kernels"] = attention_kernels(cache.dtype_array.dtype)
        sample = self._arguments(np.zeros(1, np.int64), cache, 1, self._buffers.logits(1))
        compile_kernel(forward, (self._team.state, 0, *sample))
        greatest(np.zeros(2, np.float32), 1)  # what sampling needs is compiled, and told of, now

    def new_cache(self, room: int | None = None) -> KVCache:
        """An empty cache for one sequence of up to `room` tokens (default: the context)."""
        if room is not None and not 0 < room <= self.context:
            raise ContextLengthError(f"a cache for {room} tokens: the model's context is {self.context}")
        return KVCache(self.config, self.context if room is None else room, self.cache_dtype, self._origin)

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Run `ids` after what is in the cache, and put them in.

        Returns logits (1, vocab_size) of the last token, or (tokens, vocab_size) with all_logits; written into `out`
        if it is given, which saves the time of fresh memory at every token.  Long inputs go in pieces of
        `chunk`; if interrupted, the cache holds the pieces that were done.  Raises before computing:
        ContextLengthError and OutOfMemoryError, OptionError for ids the model does not have, for another model's
        cache and for an `out` of another kind.
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
        """Run a prompt after what is in the cache: logits (vocab_size,) of its last token.

        progress(done, total) is called after every piece of `chunk` tokens.  Raises what `forward` raises.
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
        """Logits (tokens, vocab_size) of every position of a text.  Raises what `forward` raises."""
        tokens = self._check(ids)
        return self.forward(tokens, self.new_cache(min(tokens.size, self.context)), all_logits=True)

    def stream(self, prompt: str, **options: Any) -> Stream:
        """Generate, piece by piece as the text comes.  options: see `npqwen.generation.generate.stream`."""
        return text.stream(self, prompt, **options)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells this model, in this conversion, from others; see `npqwen.engine.fingerprint`."""
        return fingerprint(self.config, self.weights)

    @overload
    def generate(self, prompt: str, *, n: None = None, **options: Any) -> Completion: ...

    @overload
    def generate(self, prompt: str, *, n: int, **options: Any) -> list[Completion]: ...

    def generate(self, prompt: str, *, n: int | None = None, **options: Any) -> Completion | list[Completion]:
        """Generate a whole text, or `n` of them.  options: see `npqwen.generation.generate`."""
        return text.generate(self, prompt, n=n, **options)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's own; there is none in a base model, which `render` then says."""
        from npqwen.chat.chat_template import ChatTemplate

        return ChatTemplate.from_directory(self.path)

    def render(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """The text of a conversation as the model was trained on it: its chat template's, see `ChatTemplate.render`."""
        return self.chat_template.render(messages, tools, thinking, add_generation_prompt, **template_options)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        thinking: bool | None = None,
        run_tools: bool = False,
        **options: Any,
    ) -> Reply:
        """Answer a conversation.

        messages: [{"role": "user", "content": "17 + 25?"}, ...]; append the reply's `messages` to go on. A string is
        one message of the user.
        tools: JSON schemas, or Python functions with hints and docstrings. run_tools: call the functions that the
        model asks for and have it read what they return or raise, up to max_steps (8) answers in a row.
        thinking: True or False; None is the model's own way. A model that has no switch refuses the other way.
        template_options: a dictionary of what the chat template takes beyond that, such as template="rag".
        stop: a string or several; the answer ends before the first that its text has. Thoughts and calls may say it.
        session: a `Session` of this model; what it has computed of the messages before is not computed again.
        The other options are those of `npqwen.generation.generate.stream`. Where they are left out, sampling is what
        the model's authors advise with or without thinking, and loop_guard is on.

        Raises OptionError for wrong messages or options, ContextLengthError for a conversation that does not fit.
        """
        return self.stream_chat(messages, tools=tools, thinking=thinking, run_tools=run_tools, **options).run()

    def stream_chat(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> ChatStream:
        """`chat`, event by event as the answer comes: Reasoning, Text, ToolCall, ToolResult, Notice, Finish."""
        from npqwen.chat.answer import stream_chat

        return stream_chat(self, messages, **options)

    def conversation(self, system: str | None = None, **options: Any) -> Conversation:
        """A conversation that keeps its messages and what was computed of them; options: those of `chat`."""
        from npqwen.chat.conversation import Conversation

        return Conversation(self, system, **options)

    def _pass(self, ids: NDArray[np.int64], cache: KVCache, out: NDArray[np.float32]) -> None:
        """One forward pass of at most `chunk` tokens; logits of as many of the last ones as out has rows."""
        rows = len(out)
        with self._turn():
            logits = self._buffers.logits(rows)
            # Where the kernels need no more room than there is, they write the one row where it is wanted.
            direct = rows == 1 and out.shape[1] == logits.shape[1] and out.flags.c_contiguous
            # Weights that memory does not hold come from the disk: then even one token is not soon done.
            here = ids.size <= FEW and not self._short
            self._team.run(forward, *self._arguments(ids, cache, rows, out if direct else logits), here=here)
            cache.length += ids.size
            if not direct:
                out[:] = logits[:rows, : self.config.vocab_size]

    def _reserve(self, cache: KVCache, tokens: int) -> None:
        """Make room for so many more tokens in a cache, which is checked: kernels write where it says."""
        if cache.origin is not self._origin:
            raise OptionError("the cache is another model's; make one with this model's new_cache()")
        cache.reserve(tokens)

    def _logits(self, rows: int, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Room for so many rows of logits: `out`, which is checked, or a new array."""
        shape = rows, self.config.vocab_size
        if out is None:
            return self._new_logits(rows)
        if out.shape != shape or out.dtype != np.float32:
            raise OptionError(f"out is {out.dtype} {out.shape}; these logits are float32 {shape}")
        return out

    def _new_logits(self, rows: int) -> NDArray[np.float32]:
        # Those of a piece are in the buffers, too.
        size = 4 * self.config.vocab_size * (rows + min(rows, self.chunk))
        available = available_memory() if rows > self.chunk else None  # asking takes half a millisecond
        too_large = OutOfMemoryError(
            f"logits of {rows} tokens take {size / 1e9:.2f} GB, more than there is memory left; "
            "ask for those of fewer tokens at a time"
        )
        if available is not None and size > available - HEADROOM:
            raise too_large
        try:
            return np.empty((rows, self.config.vocab_size), np.float32)
        except MemoryError:  # a limit of addresses, or a system that promises no more than it has
            raise too_large from None

    def _turn(self) -> threading.Lock:
        """Held by the thread whose pass runs.  A forked process has its own: its holder is not there."""
        return self._turns.setdefault(os.getpid(), threading.Lock())

    def _arguments(
        self, ids: NDArray[np.int64], cache: KVCache, rows: int, logits: NDArray[np.float32]
    ) -> tuple[Any, ...]:
        """What `forward` takes after the team's state and the member."""
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
        """End the threads, after the pass under way, and let the files go.  The model computes no more."""
        with self._turn():
            self._team.close()
            self.weights.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    on_compile: Callable[[int, int], None] | None = None,
) -> Model:
    """Map a converted directory.

    threads: default, this machine's performance cores.  context: the most tokens a sequence may have, default the
    model's own.  on_compile(done, total): called while kernels are compiled, on the first use on a machine.
    Raises CheckpointError or FormatError for a directory that is none, OptionError for impossible options,
    OutOfMemoryError if memory cannot hold the cache of a context that is given, beside the buffers.
    """
    return Model(Path(path), threads=threads, context=context, on_compile=on_compile)


def chunk_of(config: Config) -> int:
    """Tokens of a prompt that go through the layers together."""
    return CHUNK if config.mixture is None else SPARSE_CHUNK


def cache_dtype(bits: int) -> type[np.float16] | type[np.float32]:
    """What the KV cache holds: bf16 weights are the exact baseline, so there nothing is rounded further."""
    return np.float32 if bits == 16 else np.float16


def context_of(config: Config, wanted: int | None) -> int:
    """The most tokens a sequence may have: what is wanted, or all the model can; OptionError beyond that."""
    most = config.max_position_embeddings
    if config.yarn is not None:
        most = max(most, int(config.yarn.factor * config.yarn.original_max_position_embeddings))
    if wanted is None:
        return most
    if not isinstance(wanted, int | np.integer) or isinstance(wanted, bool) or not 0 < wanted <= most:
        raise OptionError(f"context is {wanted!r}; this model's is a whole number, 1 to {most} tokens")
    return int(wanted)
