"""Use one model from several threads, as a server would.

    python examples/threads.py [MODEL] [WORD...]

The weights are in memory once. One forward pass runs at a time, on all of the model's cores; the texts take
turns token by token, and each has a cache of its own.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
WORDS = sys.argv[2:] or ["river", "winter", "teacher", "house"]
PROMPT = "<|im_start|>user\nDefine {}.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def main() -> None:
    with npqwen.load(MODEL, bits=8) as model, ThreadPoolExecutor(max_workers=4) as pool:

        def define(word: str) -> str:
            return model.generate(PROMPT.format(word), max_tokens=100, temperature=0).text

        for meaning in pool.map(define, WORDS):
            print(meaning)


if __name__ == "__main__":
    main()
