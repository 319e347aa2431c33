"""Choose among labels by their probability instead of by generated text: the answer is always one of them.

    python examples/labels.py [MODEL] [WORD...]

MODEL is a hub id or a directory; the default is the small model beside this file, which knows common English words.
"""

import sys
from pathlib import Path

import numpy as np

import npqwen

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
WORDS = sys.argv[2:] or ["river", "beautiful", "quickly", "write"]
LABELS = ["noun", "verb", "adjective", "adverb"]
PROMPT = "<|im_start|>user\nDefine {0}.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{0}"


def main() -> None:
    with npqwen.load(MODEL, bits=8) as model:
        session = npqwen.Session(model)  # what the prompts have in common is computed once
        for word in WORDS:
            scores = model.score(PROMPT.format(word), [f" ({label})" for label in LABELS], session=session)
            probabilities = np.exp([score.logprob for score in scores])
            probabilities /= probabilities.sum()
            ranked = sorted(zip(probabilities, LABELS, strict=True), reverse=True)
            print(f"{word}: " + ", ".join(f"{label} {probability:.0%}" for probability, label in ranked))


if __name__ == "__main__":
    main()
