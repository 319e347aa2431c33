"""A model that answers with given texts, whatever the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY
from maxima import write_maxima
from numpy.typing import ArrayLike, NDArray

from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_stream import ChatStream, stream_chat
from npqwen.chat.chat_template import ChatTemplate
from npqwen.chat.conversation import Conversation
from npqwen.chat.events import Reply
from npqwen.engine.adapters import Adapters
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.piece import Piece
from npqwen.engine.prefixes import Prefixes
from npqwen.format.config import Config
from npqwen.generation.drafting import Drafting
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.sampling import Sampling
from npqwen.kernels.cache_page import PAGE
from npqwen.tokenizer import Tokenizer
from npqwen.tools.calls import ToolCall

EOS = 4098
TEMPLATES = Path(__file__).parent / "data" / "templates"
TOKENIZER = Tokenizer.from_directory(TINY)
THINKING = Sampling(temperature=0.6, top_k=20, top_p=0.95)
GREEDY = Sampling(temperature=0)


@cache
def chat_template(source: str) -> ChatTemplate:
    """A template, compiled once for all tests."""
    return ChatTemplate({"default": source}, {}, Path("model"))


class RecitersCache(KVCache):
    """Pages that hold the ids that were run, in place of keys and values."""

    script: list[int] | None = None
    start = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids in the cache."""
        pages = [_page_ids(page) for page in self.pages(self.length)]
        return tuple(np.concatenate(pages)[: self.length].tolist()) if pages else ()

    def append(self, ids: NDArray[Any]) -> None:
        self.reserve(ids.size)
        pages = self.pages(self.length + ids.size)
        for id in ids.tolist():
            _page_ids(pages[self.length // PAGE])[self.length % PAGE] = id
            self.length += 1

    def fork(self, length: int | None = None) -> RecitersCache:
        fork = super().fork(length)
        assert isinstance(fork, RecitersCache)
        fork.script = None
        return fork


def _page_ids(page: NDArray[Any]) -> NDArray[np.int32]:
    """A view of a page's first bytes as ids."""
    ids: NDArray[np.int32] = page[(0,) * (page.ndim - 1)].view(np.int32)[:PAGE]
    return ids


class Reciter:
    """Answers every prompt with the next of `texts`, then eos.

    texts: strings, or token ids. A forced token takes the place of the text's own.
    calls: tokens of each forward pass. read: tokens of each prompt that were computed. prompt_ids, prompts: the whole
    prompts, as ids and as text.
    """

    name = "m"
    task = "text"
    bits = 4
    threads = 1
    weight_bytes = 0

    def __init__(
        self,
        *texts: str | list[int],
        template: str = "hybrid",
        context: int = 2048,
        sampling: Sampling = THINKING,
    ) -> None:
        self.chat_template = chat_template((TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"))
        self.tokenizer = TOKENIZER
        self.context = context
        self.path = TINY
        self.config = replace(Config.from_directory(TINY), vocab_size=4128, max_position_embeddings=max(context, 2048))
        self.generation_config = GenerationConfig(frozenset({EOS}), sampling)
        self.fingerprint = "reciter"
        self.adapters = Adapters({}, self.config)
        self.prefixes = Prefixes(1 << 28)
        self.drafting = Drafting()
        self.prompts: list[str] = []
        self.prompt_ids: list[list[int]] = []
        self.read: list[int] = []
        self.calls: list[int] = []
        self._texts = [TOKENIZER.encode(text) if isinstance(text, str) else text for text in texts]
        self._script: list[int] = []
        self._start = 0

    def close(self) -> None:
        pass

    chunk = 256

    def new_logits(self, rows: int) -> NDArray[np.float32]:
        return np.empty((rows, self.config.vocab_size), np.float32)

    def forward_pieces(
        self,
        pieces: Sequence[Piece],
        out: NDArray[np.float32] | None = None,
        maxima: NDArray[np.float32] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Each text's prompt ends with the first piece whose logits are read."""
        found = []
        for piece in pieces:
            assert isinstance(piece.cache, RecitersCache)
            script, start = piece.cache.script, piece.cache.start
            if script is not None and piece.cache.length >= start + len(script) - 1:
                script = None  # after its text, a cache may be used for a prompt that continues it
            is_prompt = piece.rows > 0 and script is None
            if is_prompt:
                script, start = [*self._texts.pop(0), EOS], piece.cache.length + piece.ids.size
                self.read.append(piece.ids.size)
            self._script, self._start = script or [], start
            logits = self.forward(piece.ids, piece.cache, all_logits=True)
            piece.cache.script, piece.cache.start = script, start
            if is_prompt:
                self._record(piece.cache)
            found.append(logits[len(logits) - piece.rows :])
        write_maxima(found, maxima)
        return found

    def new_cache(self, room: int | None = None, adapter: str | None = None) -> RecitersCache:
        assert adapter is None
        assert room is None or room <= self.context
        return RecitersCache(self.config, room or self.context, "f16")

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        assert isinstance(cache, RecitersCache)
        count = np.size(ids)
        self._script = [*self._texts.pop(0), EOS]
        self._start = cache.length + count
        cache.script, cache.start = self._script, self._start
        self.read.append(count)
        logits: NDArray[np.float32] = self.forward(ids, cache)[-1]
        if progress is not None:
            progress(count, count)
        self._record(cache)
        return logits

    def _record(self, cache: RecitersCache) -> None:
        self.prompt_ids.append(list(cache.ids))
        self.prompts.append(TOKENIZER.decode(list(cache.ids), special=True))

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        assert isinstance(cache, RecitersCache)
        tokens = np.asarray(ids)
        assert tokens.dtype.kind == "i"
        cache.append(tokens)
        self.calls.append(tokens.size)
        logits = np.full((tokens.size if all_logits else 1, self.config.vocab_size), -100, np.float32)
        for row, length in zip(logits[::-1], range(cache.length, 0, -1), strict=False):
            at = length - self._start
            row[self._script[at] if 0 <= at < len(self._script) else EOS] = 100
        return logits

    def stream_chat(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> ChatStream:
        return stream_chat(self, messages, **options)

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Reply:
        return self.stream_chat(messages, **options).run()

    def conversation(self, system: str | None = None, **options: Any) -> Conversation:
        return Conversation(self, system, **options)


def without_ids(calls: Iterable[ToolCall]) -> list[ToolCall]:
    """The calls, without their random ids."""
    return [replace(call, id="") for call in calls]


def recite(text: str | list[int], context: int = 1000) -> Reciter:
    """A greedy model that continues any prompt with `text`."""
    return Reciter(text, context=context, sampling=GREEDY)


_: type[ChatModel] = Reciter
