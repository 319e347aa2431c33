"""The scheduler that reads texts: which tokens of which texts go into the next forward pass, and what they share."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.piece import Piece
from npqwen.errors import OutOfMemoryError
from npqwen.format.layout import ceil_div
from npqwen.generation.batch import ALONE, PARALLEL
from npqwen.generation.cache_memory import CacheMemory
from npqwen.generation.prompt_speed import PromptSpeed
from npqwen.generation.scheduler_statistics import SchedulerStatistics
from npqwen.kernels.cache_page import PAGE
from npqwen.retrieval.readings import Readings, Text
from npqwen.wording import size

if TYPE_CHECKING:
    from npqwen.engine.engine import Engine
    from npqwen.engine.kv_cache import KVCache
    from npqwen.engine.prefix_page import Ids

_SECONDS_PER_TOKEN = ALONE / 256
"""Assumed until passes are measured."""
_KEPT_PAGES = 2
"""A text's cache is kept for the next text if it has at most this many pages beyond the common tokens."""


class Reader:
    """Computes the final hidden states of many texts, several in each forward pass. Not thread-safe: `step`, which
    runs a pass, and all other methods belong to one thread.

    Passes are packed with pieces of texts of any length, without padding and without sorting. Texts are scheduled
    earliest deadline first, where the deadline is when the text would be read if its request were alone: a query does
    not wait for a thousand documents, and they do not starve. States are bitwise equal to those of a text read alone.

    The prefix that all texts of a request share is computed once, by the first text; the others fork its cache. The
    next text reuses the memory of a finished one's cache, which needs no clearing.
    """

    def __init__(self, model: Engine, *, parallel: int = PARALLEL, memory: int | None = None) -> None:
        """parallel: the most texts that have a cache at once. memory: bytes for keys and values, including those of the
        model's pool of prefixes; None: whatever is available."""
        self._model = model
        self._parallel = parallel
        self._memory = CacheMemory([model.prefixes], memory)
        self._readings: list[Readings] = []
        self._prefixes = model.prefixes
        self._page_bytes = model.new_cache(1).page_bytes
        self._speed = PromptSpeed(_SECONDS_PER_TOKEN, model.chunk)
        self._order = itertools.count()
        self.statistics = SchedulerStatistics()
        """Texts count as prompts: nothing is generated."""
        self.limit(memory)

    @property
    def waiting(self) -> int:
        """How many readings have not begun."""
        return sum(not readings.begun for readings in self._readings)

    @property
    def running(self) -> int:
        """How many readings have begun."""
        return len(self._readings) - self.waiting

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages, shared ones counted once."""
        return self._memory.held(self._caches())

    def read(self, texts: Sequence[Ids], on_read: Callable[[int, int], object] | None = None) -> NDArray[np.float32]:
        """Read texts to their end; see `Readings.states`. Raises what ended them early."""
        if texts:
            self._prefixes.fetch(texts[0][:-1])
        ends: list[BaseException | None] = []
        readings = self.add(texts, ends.append, on_read)
        try:
            while not ends:
                self.step()
        finally:
            self.cancel(readings)
        if ends[0] is not None:
            raise ends[0]
        return readings.states

    def add(
        self,
        texts: Sequence[Ids],
        on_end: Callable[[BaseException | None], None],
        on_read: Callable[[int, int], object] | None = None,
        salt: str = "",
    ) -> Readings:
        """Add texts; see `Readings` for the functions, which `step` calls, and the salt."""
        readings = Readings(texts, self._model.config.hidden_size, on_end, on_read, salt)
        self.statistics.prompt_tokens += readings.tokens
        self._readings.append(readings)
        return readings

    def cancel(self, readings: Readings) -> None:
        """Remove texts at the next step. No effect if they have ended."""
        readings.cancelled = True

    def step(self) -> bool:
        """Run one pass; returns whether there is anything left to run.

        An exception of the model in a pass is raised here, and leaves all texts as they were before the pass.
        """
        for readings in [each for each in self._readings if each.cancelled or each.done == len(each.texts)]:
            self._end(readings, None)
        chosen = self._choose()
        if chosen:
            self._run(chosen)
        self.statistics.cache_bytes = self.cache_bytes
        return bool(self._readings)

    def fail(self, error: BaseException) -> None:
        """End all texts with an exception."""
        for readings in self._readings.copy():
            self._end(readings, error)

    def limit(self, memory: int | None) -> None:
        """Change the memory limit for keys and values; unused caches and kept prefixes are evicted to meet it."""
        self._memory.set_limit(memory)
        while self._memory.lacks(self._caches(), 0) and self._drop_unused():
            pass
        self.statistics.cache_bytes = self.cache_bytes

    def _caches(self) -> Iterator[KVCache]:
        for readings in self._readings:
            yield from readings.free
            yield from (text.cache for text in readings.running if text.cache is not None)

    def _choose(self) -> list[tuple[Text, int]]:
        """Texts and how many tokens of each to run; their caches have room for them."""
        heap: list[tuple[float, int, Text]] = []

        def offer(text: Text) -> None:
            deadline = text.readings.arrived + text.ahead * self._speed.seconds_per_token
            heapq.heappush(heap, (deadline, next(self._order), text))

        for readings in self._readings:
            for text in readings.running:
                offer(text)
            if readings.waiting:
                offer(readings.waiting[0])
        room = self._speed.tokens_in(ALONE)
        chosen: list[tuple[Text, int]] = []
        while heap and room > 0:
            text = heapq.heappop(heap)[2]
            readings = text.readings
            if readings not in self._readings:
                continue
            begins = text.cache is None
            try:
                if begins and not self._begin(text):
                    continue
                assert text.cache is not None
                count = text.cache.span(min(text.left, room))
                text.cache.reserve(count)
            except OutOfMemoryError as error:
                self._end(readings, error)
                room += sum(count for other, count in chosen if other.readings is readings)
                chosen = [each for each in chosen if each[0].readings is not readings]
                continue
            chosen.append((text, count))
            room -= count
            if begins and readings.waiting:
                offer(readings.waiting[0])
        return chosen

    def _begin(self, text: Text) -> bool:
        """Give a text a cache, with the common tokens if they are computed; returns whether it could start."""
        readings = text.readings
        if sum(len(each.running) for each in self._readings) >= self._parallel:
            return False
        if not self._has_memory(text):
            return False
        cache = self._cache(text)
        if cache is None:
            return False  # the common tokens are being computed
        readings.waiting.popleft()
        readings.running.append(text)
        text.cache = cache
        readings.cached += cache.length
        self.statistics.cached_tokens += cache.length
        return True

    def _cache(self, text: Text) -> KVCache | None:
        """A cache with the computed prefix of a text; None if the text should wait for the common tokens."""
        readings = text.readings
        if readings.free:
            return readings.free.pop()
        if readings.common and readings.running:
            caches = [other.cache for other in readings.running if other.cache is not None]
            holder = next((one for one in caches if one.reusable(readings.common) == readings.common), None)
            if holder is not None:
                return holder.fork(readings.common)
            if any(one.length < readings.common for one in caches):
                return None
        cache = self._model.new_cache(max(map(len, readings.texts)))
        cache.salt = readings.salt
        found = self._prefixes.find(text.ids[: readings.common or -1], cache.scope)
        if found.length:
            found.load_into(cache)
        if readings.common:  # at a checkpoint, where a hybrid's other texts branch off
            cache.mark([readings.common])
            readings.common = cache.expected(readings.common)
        return cache

    def _has_memory(self, text: Text) -> bool:
        """Whether the pages of a text fit, after evicting unused caches and kept prefixes.

        Raises OutOfMemoryError if they do not fit even though nothing else is being read.
        """
        if self._memory.limit is None:
            return True
        running = [other for readings in self._readings for other in readings.running]
        need = ceil_div(len(text.ids), PAGE)
        need += sum(ceil_div(len(other.ids), PAGE) - other.cache.page_count for other in running if other.cache)
        while self._memory.lacks(self._caches(), need * self._page_bytes):
            if self._drop_unused():
                continue
            if running:
                return False
            raise OutOfMemoryError(
                f"a text of {len(text.ids)} tokens does not fit into {size(self._memory.limit)} of memory for keys and "
                "values; shorten it"
            )
        return True

    def _drop_unused(self) -> bool:
        """Free an unused cache, or else evict the oldest page of a kept prefix; returns whether there was one."""
        for readings in self._readings:
            if readings.free:
                readings.free.pop()
                return True
        return self._memory.evict_prefix()

    def _run(self, chosen: list[tuple[Text, int]]) -> None:
        pieces = []
        for text, count in chosen:
            assert text.cache is not None
            start = text.cache.length
            ids = text.ids[start : start + count].astype(np.int64)
            pieces.append(Piece(ids, text.cache, int(count == text.left)))
        start_time = time.perf_counter()
        states = self._model.hidden_pieces(pieces)
        seconds = time.perf_counter() - start_time
        tokens = sum(count for _, count in chosen)
        self.statistics.prefill_seconds += seconds
        self._speed.add(tokens, seconds)
        for (text, _), state in zip(chosen, states, strict=True):
            readings = text.readings
            if readings.common and not readings.known and text.cache is not None:
                self._keep_common(readings, text.cache)
            if len(state):
                self._finish(text, state[0])

    def _keep_common(self, readings: Readings, cache: KVCache) -> None:
        """Put the common tokens into the pool of prefixes, once they are computed."""
        if cache.length >= readings.common:
            readings.known = True
            self._prefixes.keep(readings.texts[0][: readings.common], cache)

    def _finish(self, text: Text, state: NDArray[np.float32]) -> None:
        """Store a text's state, and keep its cache for the next text."""
        readings, cache = text.readings, text.cache
        assert cache is not None
        readings.states[text.index] = state
        readings.running.remove(text)
        text.cache = None
        readings.done += 1
        if readings.waiting and cache.reusable(readings.common) == readings.common:
            if cache.page_count <= readings.common // PAGE + _KEPT_PAGES:
                cache.truncate(readings.common)
                readings.free.append(cache)
            elif readings.common:  # without the pages after them
                readings.free.append(cache.fork(readings.common))
        if readings.on_read is not None:
            readings.on_read(readings.done, len(readings.texts))
        if readings.done == len(readings.texts):
            self._end(readings, None)

    def _end(self, readings: Readings, error: BaseException | None) -> None:
        """Remove texts, and free their memory."""
        if readings not in self._readings:
            return
        self._readings.remove(readings)
        readings.running.clear()
        readings.waiting.clear()
        readings.free.clear()
        readings.on_end(error)
