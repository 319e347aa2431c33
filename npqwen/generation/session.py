"""A text that grows, and is sometimes rewritten, with the cache of what was computed of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npqwen.engine import snapshot
from npqwen.errors import OptionError
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.stream import Stream

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache


class Session:
    """Runs prompts that begin alike, as the turns of a conversation do: only what differs is computed.

    However a stream ends - at its end, closed early, by Ctrl-C in the middle of a pass, by an error - the session
    knows which tokens its cache holds, and goes on from there.  One thread at a time.

    Logits are to the bit those of a fresh start, except where attention is cut into spans among threads: with few
    key/value heads, many threads and more than 1,000 tokens they differ by float32 rounding.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._start(model, model.new_cache(), [])

    def _start(self, model: LanguageModel, cache: KVCache, ids: Sequence[int]) -> None:
        self.model = model
        self.cache = cache
        self._ids = [int(id) for id in ids]
        self._stream: Stream | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens whose keys and values the cache holds."""
        ids = self._ids if self._stream is None else self._stream.prompt_ids + self._stream.ids
        return ids[: self.cache.length]

    def stream(self, ids: Sequence[int], **options: Any) -> Stream:
        """Generate what follows the prompt `ids`; of what the cache holds, the common beginning is kept.

        options: those of `npqwen.generation.generate.stream`. A stream of this session that has not ended is closed. If
        this raises, the session keeps all it has.
        """
        known = self._settle()
        # The last token is run in any case: its logits are not kept.
        reused = min(common_prefix(known, ids), max(0, len(ids) - 1))
        self._stream = Stream(self.model, ids, cache=self.cache, cached=reused, **options)
        return self._stream

    def prefill(self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Read `ids` ahead, such as a long document, to `fork` or `save` it; the cache holds just them then.

        progress(done, total): called as they are read. If interrupted, the session keeps what was done.
        """
        known = self._settle()
        reused = common_prefix(known, ids)
        rest = np.array(ids[reused:], np.int64)
        self.cache.truncate(reused)
        self._ids = [int(id) for id in ids]
        if rest.size:
            self.model.prefill(rest, self.cache, progress)

    def fork(self) -> Session:
        """An independent session with the same past; keys and values are shared until one of them differs."""
        fork = Session.__new__(Session)
        fork._start(self.model, self.cache.fork(), self.ids)
        return fork

    def save(self, path: str | Path) -> None:
        """Write the tokens and their keys and values to a file, whole or not at all; it may replace another.

        The file serves the same model only, on any machine. Raises OutputError if it cannot be written.
        """
        snapshot.save(Path(path), self.cache, self.ids, self.model.fingerprint)

    @classmethod
    def load(cls, model: LanguageModel, path: str | Path) -> Session:
        """Read what `save` wrote.

        Raises FormatError for a file that is none, is truncated, or was saved from another model, and
        ContextLengthError if it holds more tokens than the model's context.
        """
        cache = model.new_cache()
        ids = snapshot.load(Path(path), cache, model.fingerprint, model.config.vocab_size)
        session = cls.__new__(cls)
        session._start(model, cache, ids)
        return session

    def _settle(self) -> list[int]:
        """End the last stream, and return the ids that the cache holds."""
        if self._stream is not None:
            try:
                self._stream.close()
            except ValueError:  # the generator runs
                raise OptionError("another thread still runs the session's stream; give each its own fork") from None
            self._ids, self._stream = self.ids, None
        return self.ids


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
