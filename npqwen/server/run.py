"""A running request as its handler sees it: events from the engine's thread, received in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from npqwen.chat.events import Event, Finish, Reply
from npqwen.errors import ClosedError
from npqwen.generation.completion import Completion, TokenLogprobs, Usage
from npqwen.server.exchange import current


@dataclass(frozen=True)
class Progress:
    """Of the prompt's `total` tokens, `done` are in the cache, including `cached` that were there from the start."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Scored:
    """The log-probabilities of the next tokens, sent before the events of their text; only if they were requested."""

    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Completed:
    """The last event of a continuation of raw text."""

    completion: Completion


@dataclass(frozen=True, eq=False)
class States:
    """The only event of a `ReadRequest`: the hidden states, see `npqwen.retrieval.readings.Readings`, and the usage."""

    values: NDArray[np.float32]
    usage: Usage


RunEvent = Event | Progress | Scored | Completed | States
Take = Callable[[int, RunEvent], object]
"""take(index, event): takes an event of choice `index`."""


class Run:
    """The events of a request, each with the index of the choice (0 to n - 1) that it belongs to.

    A chat has those of `ChatStream`, with `Finish` as the last one of each choice; raw text has `Text`, and `Completed`
    as the last. `Progress` and `Scored` occur in both. A `ReadRequest` has a single event, `States`. Events are passed
    to a callback as they arrive: a queue between two tasks would cost more than most events.
    """

    def __init__(
        self,
        choices: int,
        prompt_tokens: int,
        cancel: Callable[[Run], None],
        progress: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """prompt_tokens: including those that the template adds. cancel: tells the engine's thread to end the run.
        progress: returns how many tokens of the prompt were cached, and how many are generated so far."""
        self.choices = choices
        self.prompt_tokens = prompt_tokens
        self.cancelled = False
        self.progress = progress
        self._cancel = cancel
        self.loop = asyncio.get_running_loop()
        self._early: list[tuple[int, RunEvent] | BaseException] = []
        """What arrived before `for_each` was called."""
        self._take: Take | None = None
        self._ended = asyncio.Event()
        self._error: BaseException | None = None
        self._left = choices
        exchange = current.get()
        if exchange is not None:
            exchange.computations.append(self)

    @property
    def complete(self) -> bool:
        """Whether all its choices have ended by themselves."""
        return not self._left

    def cancel(self) -> None:
        """End the request after the pass in progress, also during prefill. Any thread may call this, repeatedly."""
        if not self.cancelled:
            self.cancelled = True
            self._cancel(self)
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.receive, None)

    def receive(self, item: tuple[int, RunEvent] | BaseException | None) -> None:
        """Take an event, an exception that ends the run, or None for its end. Called in the event loop's thread."""
        if self.cancelled or item is None:
            self._ended.set()
        elif self._ended.is_set():
            pass
        elif self._take is None:
            self._early.append(item)
        elif isinstance(item, BaseException):
            self._end(item)
        else:
            index, event = item
            if isinstance(event, Finish | Completed | States):
                self._left -= 1
            try:
                self._take(index, event)
            except Exception as error:
                self._end(error)
            if not self._left:
                self._ended.set()

    async def for_each(self, take: Take) -> None:
        """Call take(index, event) for each event as it arrives; returns after the last choice's last event or `cancel`.

        To be called once. Raises what generation raised, ClosedError if the server is shutting down, and what `take`
        raises.
        """
        self._take = take
        early, self._early = self._early, []
        for item in early:
            self.receive(item)
        try:
            await self._ended.wait()
        finally:
            self._ended.set()  # later events have no reader
        if self._error is not None:
            raise self._error

    async def replies(self) -> list[Reply]:
        """Wait for all answers of a chat, in order. Raises ClosedError if the run was cancelled."""
        return cast("list[Reply]", await self.results())

    async def completions(self) -> list[Completion]:
        """Wait for all continuations of raw text, in order. Raises ClosedError if the run was cancelled."""
        return cast("list[Completion]", await self.results())

    async def states(self) -> States:
        """Wait for the hidden states of texts. Raises ClosedError if the run was cancelled."""
        found: list[States] = []

        def take(index: int, event: RunEvent) -> None:
            if isinstance(event, States):
                found.append(event)

        await self.for_each(take)
        if not found:
            raise ClosedError("the request was cancelled")
        return found[0]

    async def results(self) -> list[Reply | Completion]:
        """Wait for all answers or continuations, in order. Raises ClosedError if the run was cancelled."""
        results: dict[int, Reply | Completion] = {}

        def take(index: int, event: RunEvent) -> None:
            if isinstance(event, Finish):
                results[index] = event.reply
            elif isinstance(event, Completed):
                results[index] = event.completion

        await self.for_each(take)
        if len(results) < self.choices:
            raise ClosedError("the request was cancelled")
        return [results[index] for index in range(self.choices)]

    def _end(self, error: BaseException) -> None:
        self._error = error
        self._ended.set()
