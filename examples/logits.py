"""Show the most probable next tokens after a text: logits are NumPy arrays.

    python examples/logits.py [MODEL] [TEXT]

MODEL is a hub id or a directory; the default is the small model beside this file.
"""

import sys
from pathlib import Path

import numpy as np

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
TEXT = sys.argv[2] if len(sys.argv) > 2 else "winter (noun): the coldest season of the"


def main() -> None:
    with npqwen.load(MODEL, bits=8) as model:
        ids = model.tokenizer.encode(TEXT)
        logits = model.logits(ids)  # float32, one row of vocab_size for every token

        # The softmax of each row, in log space.
        log_probabilities = logits - logits.max(axis=1, keepdims=True)
        log_probabilities -= np.log(np.exp(log_probabilities).sum(axis=1, keepdims=True))
        for token in np.argsort(log_probabilities[-1])[::-1][:10]:
            print(f"{np.exp(log_probabilities[-1, token]):6.1%}  {model.tokenizer.decode([int(token)])!r}")

        # Row i predicts token i + 1: the log-probabilities of the text's own tokens.
        if len(ids) > 1:
            own = log_probabilities[np.arange(len(ids) - 1), ids[1:]]
            print(f"perplexity of the text: {np.exp(-own.mean()):.2f}")


if __name__ == "__main__":
    main()
