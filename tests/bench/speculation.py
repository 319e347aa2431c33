"""What guessed tokens are worth: tokens per second with and without them, taking turns.

    python tests/bench/speculation.py MODEL [--threads N] [--rounds N] [--tokens N]

MODEL: a converted directory; random weights will do. What the model says does not matter: its text is scripted, by a
bias on the script's next token, so that every kind of text is decoded at the model's real cost.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from npqwen.generation.stream import Stream
from npqwen.model import Model, load

CODE = "".join(
    f"def area_{i}(width: float, height: float) -> float:\n    if width < {i}:\n        raise ValueError(width)\n"
    f"    return width * height + {i * 7 % 13}\n\n\n"
    for i in range(6)
)
RECORDS = "".join(f'{{"name": "item {i}", "price": {i * 17 % 101}, "tags": ["a", "b{i % 3}"]}},\n' for i in range(16))
FACTS = (
    "The lighthouse was built in 1872 on the northern cape. Its lamp was lit by oil until 1931, when a cable from the "
    "mainland brought electricity. Two keepers lived there with their families; the last left in 1986. Since then the "
    "house has been a museum, which is open from May to September and shows the lens, the logbooks and the foghorn. "
)
SUMMARY = (
    "The lighthouse on the northern cape was built in 1872. Oil lit its lamp until 1931, when a cable from the "
    "mainland brought electricity. The last keepers left in 1986; since then the house has been a museum, open from "
    "May to September, which shows the lens, the logbooks and the foghorn."
)


def texts(model: Model) -> dict[str, tuple[list[int], list[int]]]:
    """Each kind of text: the prompt's ids, and the script's."""
    encode = model.tokenizer.encode
    rng = random.Random(0)
    fresh = [rng.randrange(200, min(model.config.vocab_size, 4000)) for _ in range(1200)]
    return {
        "code edit": (encode(CODE), encode(CODE.replace("width", "length", 9))),
        "JSON copy": (encode(RECORDS), encode(RECORDS)),
        "summary": (encode(FACTS), encode(SUMMARY)),
        "no repetition": (fresh[:600], fresh[600:]),
    }


def rate(model: Model, prompt: list[int], script: list[int], speculation: bool | None) -> tuple[float, int, int]:
    """Tokens per second after the first; guessed and accepted tokens."""
    start = len(prompt)

    def follow(ids: list[int], logits: Any) -> None:
        logits[script[len(ids) - start]] = np.float32(1e4)

    options: Any = {"logits_processor": follow, "max_tokens": len(script), "speculation": speculation}
    done = Stream(model, prompt, temperature=0, **options).completion()
    assert done.ids == script[: len(done.ids)]
    return done.usage.decode_rate, done.usage.drafted_tokens, done.usage.accepted_tokens


def main() -> None:
    """Print a table: one line for each kind of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    with load(given.model, threads=given.threads) as model:
        print(f"{'text':<16}{'plain':>9}{'guessing':>10}{'ratio':>8}   guessed, accepted")
        for name, (prompt, whole) in texts(model).items():
            script = whole[: given.tokens]
            rates: dict[bool | None, list[float]] = {False: [], None: []}
            for _ in range(given.rounds):
                for speculation, found in rates.items():
                    speed, drafted, accepted = rate(model, prompt, script, speculation)
                    found.append(speed)
            plain, guessing = (statistics.median(found) for found in rates.values())
            ratio = statistics.median(b / a for a, b in zip(rates[False], rates[None], strict=True))
            print(f"{name:<16}{plain:>9.1f}{guessing:>10.1f}{ratio:>7.2f}x   {drafted}, {accepted}")
        seconds = [1000 * time for time in model.passes.seconds]
        print("milliseconds of passes of 1 to 16 tokens: " + " ".join(f"{time:.2f}" for time in seconds[1:]))


if __name__ == "__main__":
    main()
