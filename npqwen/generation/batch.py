"""The scheduler that runs many texts in one batch: which tokens of which sequences go into the next forward pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from npqwen.engine.piece import Piece, by_piece
from npqwen.engine.prefix_page import MIN_PREFIX, common_prefix
from npqwen.engine.prefixes import Prefix
from npqwen.errors import OutOfMemoryError
from npqwen.format.layout import ceil_div
from npqwen.generation.batch_entry import Entry
from npqwen.generation.cache_memory import CacheMemory
from npqwen.generation.prompt_speed import PromptSpeed
from npqwen.generation.scheduler_statistics import SchedulerStatistics
from npqwen.generation.speculation import PASS
from npqwen.kernels.cache_page import PAGE
from npqwen.kernels.greatest import MAXIMA_BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.language_model import LanguageModel
    from npqwen.generation.sequence import Sequence

PARALLEL = 16
"""By default, the most sequences that run at once."""
STALL = 0.15
"""The most seconds that a pass should take while texts are being decoded: pieces of prompts are cut to fit."""
ALONE = 1.0
"""The most seconds that a pass of prompts alone should take; sequences join and leave between passes."""
_SECONDS_PER_TOKEN = STALL / 32
"""Of prompts, assumed until passes are measured."""
_SPARE_ROWS = 16
"""How many rows of logits are allocated beyond those that a pass needs, so that few passes allocate any."""
_SHORT = 32
"""Up to this many tokens, the rest of a prompt, or forced tokens, run in one pass like a decoding step."""
_STATES = 3
"""The least recurrent states of a hybrid model's sequence: one to read, one to write, and a checkpoint."""


class Batch:
    """Runs sequences together (continuous batching). One thread calls `step`, which runs one forward pass.

    Sequences join and leave at every step. Every pass runs the next step of each text that is being decoded; the rest
    of the pass is filled with pieces of prompts, cut so that no text waits longer than about `STALL` seconds. Prompts
    are scheduled earliest deadline first, where the deadline is when the prompt would be finished if it ran alone:
    short prompts need not wait for long ones, and long ones do not starve. Prefixes that other sequences have computed
    are reused. A text is bitwise equal to the same text generated alone.

    Memory: a sequence starts when the pages of its prompt fit. If texts outgrow the memory, kept prefixes are evicted,
    then drafting by models and layers is stopped, then the youngest sequence is preempted: it waits again, and is
    recomputed.
    """

    def __init__(self, model: LanguageModel, *, parallel: int = PARALLEL, memory: int | None = None) -> None:
        """parallel: the most sequences that run at once. memory: bytes for keys and values, including kept prefixes and
        those of a draft model; None: whatever is available."""
        self._model = model
        self._parallel = parallel
        draft = model.drafting.model
        # The draft model's prefixes are evicted first: without them, drafting starts later, but no text waits.
        pools = [*([] if draft is None else [draft.model.prefixes]), model.prefixes]
        self._memory = CacheMemory(pools, memory)
        self._waiting: deque[Entry] = deque()
        self._running: list[Entry] = []
        self._prefixes = model.prefixes
        self._logits: NDArray[np.float32] | None = None
        self._maxima = np.empty((0, 0), np.float32)
        """The maxima of blocks of `_logits`, (rows, blocks)."""
        self._speed = PromptSpeed(_SECONDS_PER_TOKEN, model.chunk)
        self._pages_changed = False
        """Whether sequences have allocated or freed pages since `statistics` counted them."""
        self.statistics = SchedulerStatistics()

    @property
    def waiting(self) -> int:
        """How many sequences wait to run, preempted ones included."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many sequences are running."""
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages, shared ones counted once."""
        return self._memory.held(self._caches())

    def add(
        self,
        sequence: Sequence,
        on_text: Callable[[str], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        """Add a sequence; `step` calls on_text(text) after each of its steps, and on_end(error or None) once."""
        prompt = np.array(sequence.decoding.prompt_ids, np.int32)
        lent = sequence.cache is not None
        self._waiting.append(Entry(sequence, on_text, on_end, time.perf_counter(), prompt, lent))

    def pieces(self, sequence: Sequence) -> Generator[str, None, None]:
        """Add a sequence; its pieces of text. Iterating them advances all sequences, and raises what ended it early."""
        self._prefixes.fetch(np.array(sequence.decoding.prompt_ids[:-1], np.int32), sequence.scope)
        texts: deque[str] = deque()
        ends: list[BaseException | None] = []
        self.add(sequence, texts.append, ends.append)

        def generate() -> Generator[str, None, None]:
            try:
                while True:
                    while texts:
                        if piece := texts.popleft():
                            yield piece
                    if ends:
                        break
                    self.step()
                if ends[0] is not None:
                    raise ends[0]
            finally:
                self.cancel(sequence)

        return generate()

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence at the next step. Any thread may call this; no effect if it has ended."""
        sequence.cancelled = True

    def step(self) -> bool:
        """Run one pass; returns whether there is anything left to run.

        An exception in one sequence (from a logits_processor, say) ends that sequence only. An exception of the model
        in a pass is raised here, and leaves all sequences as they were before the pass.
        """
        self._drop_cancelled()
        self._begin()
        chosen = self._reserve(self._choose())
        if chosen:
            self._run(chosen)
        if self._pages_changed:
            self._count_pages()
        return bool(self._waiting or self._running)

    def fail(self, error: BaseException) -> None:
        """End all sequences with an exception."""
        entries = [*self._running, *self._waiting]
        self._running, self._waiting = [], deque()
        for entry in entries:
            entry.release()
            entry.on_end(error)

    def limit(self, memory: int | None) -> None:
        """Change the memory limit for keys and values; kept prefixes are evicted to meet it."""
        self._memory.set_limit(memory)
        self._memory.trim(self._caches())
        self._count_pages()

    def _caches(self) -> Iterator[KVCache]:
        """The caches of running sequences, and of the models or layers that draft for them."""
        return (cache for entry in self._running for cache in entry.sequence.caches)

    def _count_pages(self) -> None:
        self.statistics.cache_bytes = self.cache_bytes
        self._pages_changed = False

    def _drop_cancelled(self) -> None:
        for entry in [entry for entry in self._running if entry.sequence.cancelled]:
            self._end(entry)
        gone = [entry for entry in self._waiting if entry.sequence.cancelled]
        for entry in gone:
            self._waiting.remove(entry)
            entry.on_end(None)

    def _begin(self) -> None:
        """Start waiting sequences, the oldest first, as long as there is room."""
        for entry in list(self._waiting):
            if len(self._running) >= self._parallel:
                return
            length, source = self._longest_prefix(entry)
            if length < 0:
                continue  # a running sequence is computing a prefix that both share
            if not self._has_memory(entry, length):
                return
            self._waiting.remove(entry)
            self._running.append(entry)
            self._pages_changed = True
            try:
                self._set_cache(entry, length, source)
            except OutOfMemoryError as error:
                self._end(entry, error)

    def _longest_prefix(self, entry: Entry) -> tuple[int, Entry | Prefix | None]:
        """The length and the source of the longest computed prefix; length -1 if it is worth waiting for a longer one.

        The source is None if nothing is longer than what the sequence's own cache holds.
        """
        most = len(entry.prompt) - 1  # the last token is always run: its logits are not kept
        source: Entry | Prefix | None = None
        best = entry.sequence.length
        found = self._prefixes.find(entry.prompt[:most], entry.sequence.scope)
        if found.length >= max(MIN_PREFIX, best + 1):
            best, source = found.length, found
        coming = 0
        for other in self._running:
            if other.sequence.scope != entry.sequence.scope:
                continue
            shared = common_prefix(other.prompt, entry.prompt[:most])
            if shared == len(other.prompt) < other.sequence.length:
                shared = common_prefix(other.computed(), entry.prompt[:most])
            length = other.cache.reusable(shared)
            if length >= max(MIN_PREFIX, best + 1):
                best, source = length, other
            coming = max(coming, other.cache.expected(min(shared, len(other.prompt))))
        return (-1, None) if coming >= best + MIN_PREFIX else (best, source)

    def _set_cache(self, entry: Entry, length: int, source: Entry | Prefix | None) -> None:
        sequence = entry.sequence
        if isinstance(source, Entry):
            sequence.cache = source.cache.fork(length)
        elif sequence.cache is None:
            sequence.cache = sequence.new_cache()
        if isinstance(source, Prefix):
            length = source.load_into(sequence.cache)
        sequence.begin_cache(sequence.cache)
        if not entry.started:
            entry.started = True
            sequence.cached = length
            sequence.next_step()
            self.statistics.prompt_tokens += len(entry.prompt)
            self.statistics.cached_tokens += length

    def _has_memory(self, entry: Entry, shared: int) -> bool:
        """Whether the pages of a sequence's prompt fit, after evicting old prefixes; true if nothing else is running.
        """
        if self._memory.limit is None or not self._running:
            return True
        missing = entry.pages - shared // PAGE
        missing += sum(max(0, other.pages - other.cache.page_count) for other in self._running)
        cache = self._running[0].cache
        states = 0 if cache.recurrent is None else _STATES * cache.recurrent.shape.nbytes
        while self._memory.lacks(self._caches(), missing * cache.page_bytes + states):
            if not self._memory.evict_prefix():
                return False
        return True

    def _choose(self) -> list[tuple[Entry, int]]:
        """Sequences and how many tokens of each to run: one step of every text, then pieces of prompts.

        A pass without prompts is filled with draft tokens, up to `PASS` tokens in all.
        """
        steps: list[Entry] = []
        short: list[Entry] = []
        long: list[Entry] = []
        for entry in self._running:
            entry.sequence.draft(0)
            count = entry.sequence.pending_count
            (steps if count == 1 else short if count <= _SHORT else long).append(entry)
        writes = any(not entry.sequence.reads_prompt for entry in self._running)
        room = self._speed.tokens_in(STALL if long and writes else ALONE)
        chosen: list[tuple[Entry, int]] = []
        self._fill(chosen, steps, len(steps))
        if len(chosen) < len(steps):  # more than a pass takes: the others are next
            ran = {entry for entry, _ in chosen}
            self._running.sort(key=lambda entry: entry in ran)
        for entries in (short, long):
            least = self._speed.tokens_in(0)  # however slow the machine, each kind makes progress
            self._fill(chosen, sorted(entries, key=self._deadline), max(least, room - _tokens(chosen)))
        if not any(entry.sequence.reads_prompt for entry in self._running):
            self._add_drafts(chosen)
        return chosen

    def _deadline(self, entry: Entry) -> float:
        """When the rest of a prompt would be finished if it ran alone from its arrival."""
        return entry.arrived + entry.sequence.pending_count * self._speed.seconds_per_token

    def _fill(self, chosen: list[tuple[Entry, int]], entries: Iterable[Entry], most: int) -> None:
        """Add pieces of these sequences, in this order and of at most `most` tokens in all, to those of a pass."""
        most = min(most, self._model.chunk - _tokens(chosen))
        for entry in entries:
            size = min(entry.sequence.pending_count, most)
            if size > 0:
                size = entry.cache.span(size)
                chosen.append((entry, size))
                most -= size

    def _add_drafts(self, chosen: list[tuple[Entry, int]]) -> None:
        """Add draft tokens, with an equal share of the rest of the pass for each text."""
        tokens = _tokens(chosen)
        for at, (entry, size) in enumerate(chosen):
            if entry.sequence.pending_count == size:
                share = ceil_div(PASS - tokens, len(chosen) - at) if tokens < PASS else 0
                count = entry.sequence.draft(share, tokens - size)
                chosen[at] = entry, size + count
                tokens += count
        # Draft models and layers have appended to their own caches.
        while self._entries_with_drafters() and self._memory.lacks(self._caches(), 0):
            if not self._memory.evict_prefix():
                self._stop_drafting()

    def _entries_with_drafters(self) -> list[Entry]:
        """The running sequences for which a draft model or layer has a cache."""
        return [entry for entry in self._running if len(entry.sequence.caches) > 1]

    def _stop_drafting(self) -> bool:
        """Stop drafting by models and layers, and free their caches; returns whether there were any."""
        drafting = self._entries_with_drafters()
        for entry in drafting:
            entry.sequence.stop_drafting()
        return bool(drafting)

    def _reserve(self, chosen: list[tuple[Entry, int]]) -> list[tuple[Entry, int]]:
        """Allocate the pages that the pass will write; returns the sequences for which there is memory."""
        ready: list[tuple[Entry, int]] = []
        for entry, size in chosen:
            while entry in self._running:
                try:
                    self._check_memory(entry, size)
                    pages, states = entry.cache.page_table, entry.cache.missing_bytes(0)
                    entry.cache.reserve(size)
                    self._pages_changed |= states > 0 or entry.cache.page_table != pages
                except OutOfMemoryError as error:
                    self._pages_changed = True
                    if entry.sequence.draft_count:
                        size -= entry.sequence.draft_count
                        entry.sequence.draft(0)
                    else:
                        self._make_room(entry, error)
                else:
                    ready.append((entry, size))
                    break
        return [(entry, size) for entry, size in ready if entry in self._running]

    def _check_memory(self, entry: Entry, size: int) -> None:
        """Raise OutOfMemoryError if the pages for `size` more tokens would exceed the limit."""
        cache = entry.cache
        missing = cache.missing_bytes(size)
        if missing and self._memory.lacks(self._caches(), missing):
            assert self._memory.limit is not None
            raise OutOfMemoryError(
                f"{cache.length + size} tokens do not fit into {self._memory.limit / 1e9:.2f} GB of memory for keys "
                "and values; shorten the prompt, or give the server more memory"
            )

    def _make_room(self, entry: Entry, error: OutOfMemoryError) -> None:
        """Evict an old prefix, else stop drafting, else preempt the youngest sequence; if only one is running, end
        `entry` with the error."""
        if self._memory.evict_prefix() or self._stop_drafting():
            return
        youngest = max(self._running, key=lambda other: other.arrived)
        if len(self._running) == 1:
            self._end(entry, error, keep=False)
            return
        self._running.remove(youngest)
        youngest.sequence.settle()
        youngest.sequence.cache = None
        self._waiting.appendleft(youngest)
        self.statistics.preempted += 1

    def _run(self, chosen: list[tuple[Entry, int]]) -> None:
        # Adjacent tokens with the same adapter share the reads of its weights.
        chosen = sorted(chosen, key=lambda pair: -1 if (own := pair[0].sequence.adapter) is None else own.number)
        pieces = []
        for entry, size in chosen:
            sequence = entry.sequence
            rows = max(0, size - (sequence.pending_count - sequence.rows))
            ids = np.array(sequence.pending_ids(size), np.int64)
            pieces.append(Piece(ids, entry.cache, rows, sequence.draft_count))
        rows = sum(piece.rows for piece in pieces)
        if self._logits is None or len(self._logits) < rows + _SPARE_ROWS:
            self._logits = self._model.new_logits(rows + _SPARE_ROWS)
            self._maxima = np.empty((len(self._logits), self._logits.shape[1] // MAXIMA_BLOCK), np.float32)
        reads = [entry.sequence.reads_prompt for entry, _ in chosen]
        start = time.perf_counter()
        sequences = [entry.sequence for entry, _ in chosen]
        try:
            logits = self._model.forward_pieces(pieces, self._logits, self._maxima)
            self._account(sum(size for _, size in chosen), reads, time.perf_counter() - start)
            maxima = by_piece(self._maxima, pieces)
            for (entry, _), piece, own, greatest in zip(chosen, pieces, logits, maxima, strict=True):
                self._advance(entry, own if piece.rows else None, greatest)
        finally:
            for sequence in sequences:
                sequence.settle()

    def _account(self, tokens: int, reads: list[bool], seconds: float) -> None:
        """Count a pass, and update the estimate of the seconds per token of prompts.

        reads: for each sequence of the pass, whether it ran a piece of its prompt.
        """
        statistics = self.statistics
        if not any(reads):
            statistics.decode_seconds += seconds
        else:
            statistics.prefill_seconds += seconds
            self._speed.add(tokens, seconds)

    def _advance(self, entry: Entry, logits: NDArray[np.float32] | None, maxima: NDArray[np.float32]) -> None:
        """Take the steps of a sequence that its logits allow. logits: None if its prompt is not computed yet."""
        sequence = entry.sequence
        decoding = sequence.decoding
        before, drafted, accepted = len(decoding.ids), sequence.drafted, sequence.accepted
        try:
            if sequence.progress is not None and not before:
                sequence.progress(sequence.length - sequence.cached, len(entry.prompt) - sequence.cached)
            while logits is not None or not sequence.pending_count:
                entry.on_text(sequence.accept(logits, None if logits is None else maxima))
                if decoding.finished or entry.sequence.cancelled:
                    break
                sequence.next_step()
                logits = None
        except Exception as error:
            self._end(entry, error)
            return
        self.statistics.generated_tokens += len(decoding.ids) - before
        self.statistics.drafted_tokens += sequence.drafted - drafted
        self.statistics.accepted_tokens += sequence.accepted - accepted
        if decoding.finished or entry.sequence.cancelled:
            self._end(entry)

    def _end(self, entry: Entry, error: BaseException | None = None, keep: bool = True) -> None:
        """Remove a running sequence, and keep its cache as a prefix for others."""
        self._pages_changed = True
        self._running.remove(entry)
        may_have_changed = entry.lent and entry.sequence.cancelled
        if keep and entry.sequence.cache is not None and not may_have_changed:
            self._prefixes.keep(entry.computed(), entry.cache)
        entry.release()
        self._memory.trim(self._caches())
        entry.on_end(error)


def _tokens(chosen: list[tuple[Entry, int]]) -> int:
    """Tokens of the pieces of a pass."""
    return sum(size for _, size in chosen)
