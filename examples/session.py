"""Read a long text once, and ask several questions after it: the text's KV cache is kept, saved and loaded.

    python examples/session.py [MODEL] [TEXT_FILE] [QUESTION...]

MODEL is a hub id or a directory; the default is the small model beside this file, and the text is a part of its test
data: conversations, which show it how to answer.
"""

import sys
import tempfile
import time
from pathlib import Path

import npqwen

TINY = Path(__file__).with_name("tiny-qwen3")
MODEL = sys.argv[1] if len(sys.argv) > 1 else TINY
QUESTIONS = sys.argv[3:] or ["Define river.", "What is 17 + 25?", "Define winter."]


def main() -> None:
    text = Path(sys.argv[2]).read_text(encoding="utf-8") if len(sys.argv) > 2 else sample()
    with npqwen.load(MODEL, bits=8) as model, tempfile.TemporaryDirectory() as place:
        session = npqwen.Session(model)
        start = time.perf_counter()
        session.prefill(text)
        print(f"{len(session.ids)} tokens computed in {time.perf_counter() - start:.2f} s")

        file = Path(place) / "text.cache"
        session.save(file)
        start = time.perf_counter()
        session = npqwen.Session.load(model, file)  # in another process, say; it must be the same model
        print(f"saved in {file.stat().st_size / 1e6:.1f} MB, and loaded in {time.perf_counter() - start:.2f} s")

        for question in QUESTIONS:
            prompt = f"{text}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            done = model.generate(prompt, session=session, max_tokens=200, temperature=0)
            read = done.usage.prompt_tokens - done.usage.cached_tokens
            print(f"{question} {done.text}\n  ({done.usage.cached_tokens} tokens from the cache, {read} computed)")


def sample() -> str:
    """Whole conversations from the small model's test data."""
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:4000]
    return text[: text.rindex("<|im_start|>user")]


if __name__ == "__main__":
    main()
