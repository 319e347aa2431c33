"""A model that answers with texts it is given: for what a real one says too rarely."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from checkpoints import TINY

from npqwen.chat.answer import ChatStream, Reply, stream_chat
from npqwen.chat.chat_template import ChatTemplate
from npqwen.chat.conversation import Conversation
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.sampling import Sampling
from npqwen.tokenizer import Tokenizer

EOS = 4098
TEMPLATES = Path(__file__).parent / "data" / "templates"
TOKENIZER = Tokenizer.from_directory(TINY)
THINKING = Sampling(temperature=0.6, top_k=20, top_p=0.95)


class Cache:
    """As a KVCache, but all it keeps is the ids."""

    def __init__(self, limit: int, ids: Iterable[int] = ()) -> None:
        self.ids = list(ids)
        self.limit = limit

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        assert length <= self.length
        del self.ids[length:]

    def fork(self, length: int | None = None) -> Cache:
        return Cache(self.limit, self.ids[:length])


class Reciter:
    """Interface of `npqwen.model.Model`. Every prompt is answered by the next of `texts`, then eos.

    A text may be ids, too. prompt_ids, prompts: what it was asked, as ids and decoded. read: how many tokens of each
    were computed.
    """

    def __init__(self, *texts: str | list[int], template: str = "hybrid", context: int = 2048) -> None:
        source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        self.chat_template = ChatTemplate({"default": source}, {}, Path("model"))
        self.tokenizer = TOKENIZER
        self.context = context
        self.path = TINY
        self.config = SimpleNamespace(vocab_size=4128, max_position_embeddings=context)
        self.generation_config = GenerationConfig(frozenset({EOS}), THINKING)
        self.prompts: list[str] = []
        self.prompt_ids: list[list[int]] = []
        self.read: list[int] = []
        self._texts = [TOKENIZER.encode(text) if isinstance(text, str) else text for text in texts]
        self._script: list[int] = []
        self._start = 0

    def new_cache(self, room: int | None = None) -> Cache:
        return Cache(room or self.context)

    def prefill(self, ids: Any, cache: Cache, progress: Any = None) -> np.ndarray:
        self._script = [*self._texts.pop(0), EOS]
        self._start = cache.length + len(ids)
        self.read.append(len(ids))
        logits = self.forward(ids, cache)[-1]
        self.prompt_ids.append(list(cache.ids))
        self.prompts.append(TOKENIZER.decode(cache.ids, special=True))
        return logits

    def forward(self, ids: Any, cache: Cache, *, all_logits: bool = False, out: Any = None) -> np.ndarray:
        cache.ids += [int(id) for id in ids]
        assert cache.length <= cache.limit
        logits = np.full((1, 4128), -100, np.float32)
        logits[0, [*self._script, EOS][min(cache.length - self._start, len(self._script))]] = 100
        return logits

    def stream_chat(self, messages: Any, **options: Any) -> ChatStream:
        return stream_chat(self, messages, **options)  # type: ignore[arg-type]

    def chat(self, messages: Any, **options: Any) -> Reply:
        return self.stream_chat(messages, **options).run()

    def conversation(self, system: str | None = None, **options: Any) -> Conversation:
        return Conversation(self, system, **options)  # type: ignore[arg-type]
