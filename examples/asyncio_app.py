"""Stream answers in an asyncio program without blocking its event loop.

    python examples/asyncio_app.py [MODEL] [QUESTION...]

`async for` runs every step of the model in a thread. All questions are answered concurrently while a clock ticks.
MODEL is a hub id or a directory; the default is the small model beside this file.
"""

import asyncio
import sys
import time
from pathlib import Path

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
QUESTIONS = sys.argv[2:] or ["What is 17 + 25?", "Define river.", "What is 30 + 12?"]


async def answer(model: npqwen.Model, question: str) -> str:
    text = ""
    # In a thread, because it renders and encodes the prompt.
    stream = await asyncio.to_thread(model.stream_chat, question, thinking=False, temperature=0)
    async with stream:  # leaving the block, or being cancelled in it, ends the answer
        async for event in stream:
            if isinstance(event, npqwen.Text):
                text += event.text
    return f"{question} {text}"


async def tick(longest: list[float]) -> None:
    """Measure the longest time for which the event loop was blocked."""
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
    print(f"the event loop was blocked for {1000 * longest[0]:.0f} ms at most", file=sys.stderr)
    await asyncio.to_thread(model.close)


if __name__ == "__main__":
    asyncio.run(main())
