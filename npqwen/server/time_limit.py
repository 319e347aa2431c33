"""Waiting for a limited time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


async def within(seconds: float, work: Awaitable[object]) -> bool:
    """Wait for `work` at most so many seconds, then cancel it. Returns whether it ended in time; raises what it raises.

    `asyncio.wait_for` before Python 3.12 loses a cancellation of the caller at the moment in which `work` ends.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not task.done():
        return False
    task.result()
    return True
