"""Several prompts of one request, as one run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from npqwen.errors import ClosedError
from npqwen.generation.completion import Completion
from npqwen.server.requests import TextRequest
from npqwen.server.run import Completed, Run, RunEvent, Take

if TYPE_CHECKING:
    from npqwen.server.adapter_worker import AdapterWorker
    from npqwen.server.worker import Worker

AT_ONCE = 16
"""Most choices of one request that wait for the worker, or run, at once; one prompt may have more."""


class PromptsRun:
    """The events of several prompts, each of n choices: choice j of prompt i is choice i n + j here.

    Prompts are started in order, a few at a time, so that other requests take turns with them. If one fails,
    the others are cancelled, and `for_each` raises its error.
    """

    def __init__(self, worker: Worker | AdapterWorker, requests: Sequence[TextRequest]) -> None:
        self._worker = worker
        self._requests = requests
        self._prompts = iter(range(len(requests)))
        """Indices of the prompts that have not been started yet."""
        self._runs: dict[int, Run] = {}
        """The runs that have been started, by prompt."""
        self._cancelled = False

    @classmethod
    async def start(cls, worker: Worker | AdapterWorker, requests: Sequence[TextRequest]) -> PromptsRun:
        """Start the first prompts. Raises what `Worker.start` raises for them; then those started are cancelled."""
        run = cls(worker, requests)
        try:
            for _ in range(min(max(1, AT_ONCE // requests[0].n), len(requests))):
                await run._start_next()
        except BaseException:
            run.cancel()
            raise
        return run

    def cancel(self) -> None:
        """End all prompts."""
        self._cancelled = True
        for run in self._runs.values():
            run.cancel()

    async def for_each(self, take: Take) -> None:
        """Call take(index, event) for each event as it arrives; see `Run.for_each`."""
        readers = [asyncio.create_task(self._read(prompt, take)) for prompt in self._runs]
        try:
            await asyncio.gather(*readers)
        except BaseException:
            self.cancel()
            raise
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def completions(self) -> list[Completion]:
        """Wait for all choices, in order. Raises what the runs raise, and ClosedError if they were cancelled."""
        found: dict[int, Completion] = {}

        def take(index: int, event: RunEvent) -> None:
            if isinstance(event, Completed):
                found[index] = event.completion

        await self.for_each(take)
        if len(found) < sum(request.n for request in self._requests):
            raise ClosedError("the request was cancelled")
        return [found[index] for index in sorted(found)]

    async def _read(self, prompt: int | None, take: Take) -> None:
        """Forward the events of a prompt and, when it has ended, start and forward the next, until none is left."""
        while prompt is not None:
            first = prompt * self._requests[prompt].n
            await self._runs[prompt].for_each(partial(_numbered, take, first))
            prompt = await self._start_next()

    async def _start_next(self) -> int | None:
        """Start the next prompt, and return its index; None if there is none left."""
        prompt = None if self._cancelled else next(self._prompts, None)
        if prompt is not None:
            self._runs[prompt] = await self._worker.start(self._requests[prompt], admitted=prompt > 0)
            if self._cancelled:  # while it was being started
                self._runs[prompt].cancel()
        return prompt


def _numbered(take: Take, first: int, index: int, event: RunEvent) -> None:
    """Forward an event of a prompt whose first choice has the number `first`."""
    take(first + index, event)
