"""Stream answers in an asyncio program without ever blocking its loop.

    python examples/asyncio_app.py [MODEL] [QUESTION...]

A thread runs the model and hands its events to the loop. Here all questions are answered at once while a clock ticks.
MODEL is a hub id or a directory; the default is the small model beside this file.
"""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
QUESTIONS = sys.argv[2:] or ["What is 17 + 25?", "Define river.", "What is 30 + 12?"]


async def events(stream: npqwen.ChatStream) -> AsyncGenerator[npqwen.Event, None]:
    """The stream's events. Closing this, or being cancelled in it, ends the answer at its next piece."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()
    left = threading.Event()

    def produce() -> None:
        try:
            with closing(stream):
                for event in stream:
                    loop.call_soon_threadsafe(queue.put_nowait, event)
                    if left.is_set():
                        break
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, None)

    running = loop.run_in_executor(None, produce)
    try:
        while (event := await queue.get()) is not None:
            yield event
    finally:
        left.set()
        await asyncio.shield(running)  # raises what the model raised


async def answer(model: npqwen.Model, question: str) -> str:
    text = ""
    stream = await asyncio.to_thread(model.stream_chat, question, thinking=False, temperature=0)
    async with aclosing(events(stream)) as answering:
        async for event in answering:
            if isinstance(event, npqwen.Text):
                text += event.text
    return f"{question} {text}"


async def tick(longest: list[float]) -> None:
    """Note the longest time for which the loop did not come round."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        longest[0] = max(longest[0], time.perf_counter() - start)


async def main() -> None:
    model = await asyncio.to_thread(npqwen.load, MODEL, bits=4)
    longest = [0.0]
    clock = asyncio.create_task(tick(longest))
    for line in await asyncio.gather(*(answer(model, question) for question in QUESTIONS)):
        print(line)
    clock.cancel()
    print(f"the loop waited {1000 * longest[0]:.0f} ms at most", file=sys.stderr)
    await asyncio.to_thread(model.close)


if __name__ == "__main__":
    asyncio.run(main())
