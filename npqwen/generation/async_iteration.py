"""`async for` and `await` of an iterator whose steps take a while to compute.

asyncio takes 10 ms to import, so it is imported only when it is used.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio

    from typing_extensions import Self

Item = TypeVar("Item", covariant=True)
Whole = TypeVar("Whole")
_END: Any = object()


class AsyncSteps(Iterator[Item]):
    """An iterator that `async for` can read, too: every step runs in a thread, so the event loop is never blocked.

    Cancelling a task that reads it ends the iteration: `cancel`, then, once the pass in progress has ended, `close`;
    only then is CancelledError raised, so that the model is free when the task is done. `async with` closes an
    iteration that is left early.
    """

    @abstractmethod
    def close(self) -> None:
        """End the iteration early, and release what it holds."""

    @abstractmethod
    def cancel(self) -> None:
        """End the iteration after the pass in progress. Any thread may call this at any time."""

    async def aclose(self) -> None:
        """Call `close` in a thread."""
        import asyncio

        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncSteps[Item]:
        return self

    async def __anext__(self) -> Item:
        """The next item, computed in a thread. If the task is cancelled, end the iteration and raise CancelledError."""
        import asyncio

        step = asyncio.ensure_future(asyncio.to_thread(next, self, _END))
        try:
            item: Item = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.cancel()
            await _wait(step)
            await _wait(asyncio.ensure_future(self.aclose()))
            raise
        if item is _END:
            raise StopAsyncIteration
        return item


async def awaited(steps: AsyncSteps[Any], result: Callable[[], Whole]) -> Whole:
    """Run all steps in threads; then what `result` returns, for which nothing is left to compute."""
    async for _ in steps:
        pass
    return result()


async def _wait(future: asyncio.Future[Any]) -> None:
    """Wait until `future` is done, however often this task is cancelled; its result and exception are dropped."""
    import asyncio

    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    if not future.cancelled():
        future.exception()
