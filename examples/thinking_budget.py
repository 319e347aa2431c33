"""Answer one question with less and less time to think.

    python examples/thinking_budget.py [MODEL] [QUESTION]

When the budget is used up, the model is made to say that it has to answer now, in the words that Qwen3 was trained on,
and answers. MODEL is a hub id such as Qwen/Qwen3-0.6B, or a directory; the default is the small model beside this file.
The small model was never taught those words: its reasoning is cut short like any other's, but its answer is nonsense.
"""

import sys
from pathlib import Path

import npqwen

TINY = Path(__file__).with_name("tiny-qwen3")
MODEL = sys.argv[1] if len(sys.argv) > 1 else TINY
QUESTION = sys.argv[2] if len(sys.argv) > 2 else "What is 17 + 25?"


def main() -> None:
    with npqwen.load(MODEL, bits=4) as model:
        session = npqwen.Session(model)  # the question is read once
        for budget in (None, 12, 0):
            reply = model.chat(
                QUESTION, thinking=True, thinking_budget=budget, session=session, max_tokens=2000, seed=1
            )
            allowed = "no limit" if budget is None else f"{budget} tokens"
            print(f"--- {allowed}\nreasoning: {reply.reasoning}\nanswer: {reply.text}")
    if MODEL is TINY:
        print("(The small model was never taught what ends its reasoning here; try Qwen/Qwen3-0.6B.)", file=sys.stderr)


if __name__ == "__main__":
    main()
