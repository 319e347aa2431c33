"""Print a text as it is generated.

    python examples/generate.py [MODEL] [QUESTION]

MODEL is a hub id such as Qwen/Qwen3-0.6B, or a directory; the default is the small model beside this file.
It is converted to 8 bits on first use, and memory-mapped from then on.
"""

import sys
from pathlib import Path

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
QUESTION = sys.argv[2] if len(sys.argv) > 2 else "Define river."

# Qwen3's chat format; the closed <think> block asks for an answer without reasoning.
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def main() -> None:
    with npqwen.load(MODEL, bits=8) as model:
        for piece in model.stream(PROMPT, max_tokens=100, temperature=0):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
