"""Talk to a model in the terminal; an empty line ends it.

    python examples/chat.py [MODEL]

MODEL is a hub id such as Qwen/Qwen3-0.6B, or a directory; the default is the small model beside this file, which adds
numbers below 50 ("What is 17 + 25?") and defines words ("Define river."). It is converted to 4 bits on first use.
"""

import sys
from pathlib import Path

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")


def main() -> None:
    with npqwen.load(MODEL, bits=4) as model:
        # It keeps its messages and their keys and values: each turn computes only what is new.
        conversation = model.conversation(seed=1)
        while question := read_line():
            thinking = False
            for event in conversation.stream(question):
                match event:
                    case npqwen.Reasoning(text):
                        print(text if thinking else DIM + text, end="", flush=True)
                        thinking = True
                    case npqwen.Text(text):
                        print(f"{PLAIN}\n{text}" if thinking else text, end="", flush=True)
                        thinking = False
                    case npqwen.Notice(text):
                        print(f"[{text}]", file=sys.stderr)
                    case npqwen.Finish(reply):
                        print(PLAIN, flush=True)
                        print(f"[{reply.usage.decode_rate:.0f} tokens/s]", file=sys.stderr)


def read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
