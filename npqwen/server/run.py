"""A request that is being computed, as its handler sees it: events from the engine's thread, read in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from npqwen.chat.events import Event, Finish, Reply
from npqwen.errors import ClosedError
from npqwen.generation.completion import Completion, TokenLogprobs, Usage
from npqwen.server.exchange import current

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Progress:
    """Of the prompt's `total` tokens, `done` are in the cache; `cached` of them were there before."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Scored:
    """The log-probabilities of the next tokens, before the events of their text; only if they were requested."""

    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Completed:
    """The last event of a continuation of raw text."""

    completion: Completion


RunEvent = Event | Progress | Scored | Completed


class Run(AsyncIterator[tuple[int, RunEvent]]):
    """The events of a request, each with the index of the choice (0 to n - 1) that it belongs to.

    A chat's are those of `ChatStream`, with `Finish` as the last one of each choice; raw text's are `Text`, and
    `Completed` as the last. `Progress` and `Scored` come in both. The iteration ends after the last choice's last
    event. It raises what generation raised, and ClosedError if the server is shutting down; after `cancel` it ends.
    """

    def __init__(self, choices: int, prompt_tokens: int, cancel: Callable[[Run], None]) -> None:
        """prompt_tokens: of the prompt, all that the template adds included. cancel: tells the engine's thread."""
        self.choices = choices
        self.prompt_tokens = prompt_tokens
        self.cancelled = False
        self._cancel = cancel
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, RunEvent] | BaseException | None] = asyncio.Queue()
        self._left = choices
        self._exchange = current.get()
        if self._exchange is not None:
            self._exchange.prompt_tokens += prompt_tokens
            self._exchange.choices += choices

    def cancel(self) -> None:
        """End the request after the pass in progress, also within a prompt. Any thread may call this, repeatedly."""
        if not self.cancelled:
            self.cancelled = True
            self._cancel(self)
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.receive, None)

    def receive(self, item: tuple[int, RunEvent] | BaseException | None) -> None:
        """Take an event, an exception that ends the run, or None for its end. Called in the event loop's thread."""
        self._events.put_nowait(item)

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> tuple[int, RunEvent]:
        if not self._left or self.cancelled:
            raise StopAsyncIteration
        item = await self._events.get()
        if item is None:
            self._left = 0
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            self._left = 0
            raise item
        event = item[1]
        if isinstance(event, Finish | Completed):
            self._left -= 1
            if self._exchange is not None:
                self._exchange.usages.append(_usage(event))
        return item

    async def replies(self) -> list[Reply]:
        """Wait for all answers of a chat, in order. Raises ClosedError if the run was cancelled."""
        return cast("list[Reply]", await self.results())

    async def completions(self) -> list[Completion]:
        """Wait for all continuations of raw text, in order. Raises ClosedError if the run was cancelled."""
        return cast("list[Completion]", await self.results())

    async def results(self) -> list[Reply | Completion]:
        """Wait for all answers or continuations, in order. Raises ClosedError if the run was cancelled."""
        results: dict[int, Reply | Completion] = {}
        async for index, event in self:
            if isinstance(event, Finish):
                results[index] = event.reply
            elif isinstance(event, Completed):
                results[index] = event.completion
        if len(results) < self.choices:
            raise ClosedError("the request was cancelled")
        return [results[index] for index in range(self.choices)]


def _usage(event: Finish | Completed) -> Usage:
    return event.reply.usage if isinstance(event, Finish) else event.completion.usage
