"""A text that grows, and is sometimes rewritten, with the keys and values computed for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from npqwen.checks import check_ids, check_path
from npqwen.engine import snapshot
from npqwen.errors import OptionError
from npqwen.generation.decoding import TokenIds
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.options import OPTIONS
from npqwen.generation.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.options import GenerationOptions


class Session:
    """Runs prompts that share a prefix, as the turns of a conversation do, and computes only what differs.

    However a stream ends - finished, closed early, by Ctrl-C during a pass, by an error - the session knows which
    tokens its cache holds and continues from there. One thread at a time.

    Logits are bitwise equal to those of a fresh start, except where attention is split among threads: with few
    key/value heads, many threads and more than 1,000 tokens they differ by float32 rounding.
    """

    def __init__(self, model: LanguageModel) -> None:
        if not hasattr(model, "new_cache"):
            raise OptionError(f"the model is {type(model).__name__}; give what npqwen.load() returns")
        self._start(model, model.new_cache(), [])

    def _start(self, model: LanguageModel, cache: KVCache, ids: Sequence[int]) -> None:
        self.model = model
        self.cache = cache
        self._ids = list(ids)
        self._stream: Stream | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens whose keys and values the cache holds."""
        ids = self._ids if self._stream is None else self._stream.prompt_ids + self._stream.ids
        return ids[: self.cache.length]

    def stream(self, ids: TokenIds, **options: Unpack[GenerationOptions]) -> Stream:
        """Generate what follows the prompt `ids`; the prefix it shares with the cache is not computed again.

        An unfinished stream of this session is closed. Raises what `Stream` raises; the session then keeps its cache.
        """
        prompt = check_ids("the prompt", ids)
        known = self._settle()
        # The last token is always run: its logits are not stored.
        reused = self.cache.reusable(min(common_prefix(known, prompt), max(0, len(prompt) - 1)))
        self._stream = Stream(self.model, prompt, cache=self.cache, cached=reused, **options)
        return self._stream

    def prefill(self, ids: TokenIds, progress: Callable[[int, int], None] | None = None) -> None:
        """Read `ids` ahead, such as a long document, to `fork` or `save` it; afterwards the cache holds just these.

        progress(done, total) is called after every chunk. An interruption keeps the chunks that were done.
        """
        prompt = check_ids("the prompt", ids)
        if progress is not None:
            OPTIONS["progress"].check(progress)
        known = self._settle()
        reused = self.cache.reusable(common_prefix(known, prompt))
        rest = np.array(prompt[reused:], np.int64)
        self.cache.truncate(reused)
        self._ids = prompt
        if rest.size:
            self.model.prefill(rest, self.cache, progress)

    def fork(self) -> Session:
        """An independent session with the same past; keys and values are shared until one of them changes."""
        fork = Session.__new__(Session)
        fork._start(self.model, self.cache.fork(), self.ids)
        return fork

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens and their keys and values to a file, which is replaced atomically if it exists.

        The file works with the same model only, on any machine. Raises OutputError if it cannot be written.
        """
        snapshot.save(check_path(path), self.cache, self.ids, self.model.fingerprint)

    @classmethod
    def load(cls, model: LanguageModel, path: str | os.PathLike[str]) -> Session:
        """Read what `save` wrote.

        Raises FormatError for a file that is not a saved session, is truncated, or was saved from another model, and
        ContextLengthError if it holds more tokens than the model's context.
        """
        session = cls.__new__(cls)
        cache = model.new_cache()
        ids = snapshot.load(check_path(path), cache, model.fingerprint, model.config.vocab_size)
        session._start(model, cache, ids)
        return session

    def _settle(self) -> list[int]:
        """End the last stream, and return the ids that the cache holds."""
        if self._stream is not None:
            try:
                self._stream.close()
            except OptionError:
                raise OptionError("another thread is running the session's stream; give each its own fork") from None
            self._ids, self._stream = self.ids, None
        return self.ids


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two texts, in tokens."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
