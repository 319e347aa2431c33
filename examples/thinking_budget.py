"""Answer one question with less and less time to think.

    python examples/thinking_budget.py [MODEL] [QUESTION]

When the budget is used up, the model is made to say that it has to answer now, in the words that Qwen3 was trained on,
and continues from there. MODEL is a hub id or a directory; the default is the small model beside this file.
"""

import sys
from pathlib import Path

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
QUESTION = sys.argv[2] if len(sys.argv) > 2 else "What is 17 + 25?"


def main() -> None:
    with npqwen.load(MODEL, bits=4) as model:
        session = npqwen.Session(model)  # the question is read once
        for budget in (None, 400, 16):
            reply = model.chat(
                QUESTION, thinking=True, thinking_budget=budget, session=session, max_tokens=2000, seed=1
            )
            tokens = len(model.tokenizer.encode(reply.reasoning))
            print(f"budget {budget or 'none'}: {tokens} tokens of reasoning, then: {reply.text}")


if __name__ == "__main__":
    main()
