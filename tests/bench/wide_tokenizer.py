#!/usr/bin/env python3
"""Write a tokenizer with as many tokens as Qwen3's, from the example's 4,096: for benchmarks of sampling and serving.

    python tests/bench/wide_tokenizer.py OUT
    python tests/bench/make_checkpoint.py 0.6B CHECKPOINT --tokenizer OUT

With the example's own tokenizer most rows of a real model's embedding have no token, and samplers skip them. The
further tokens are pairs of words and pieces of words, each with its merge; control tokens get Qwen3's ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
ORDINARY = 151_643
"""Tokens that are not control tokens, whose ids follow."""


def widen(out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a directory."""
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    vocab, merges, random = model["vocab"], model["merges"], Random(0)
    starts = [token for token in vocab if token.lstrip("Ġ").isascii() and token.lstrip("Ġ").isalpha()]
    ends = [token for token in starts if not token.startswith("Ġ")]
    as_pairs = not isinstance(merges[0], str)
    while len(vocab) < ORDINARY:
        first, second = random.choice(starts), random.choice(ends)
        if first + second not in vocab:
            vocab[first + second] = len(vocab)
            merges.append([first, second] if as_pairs else f"{first} {second}")
    old = min(added["id"] for added in tokenizer["added_tokens"])
    for added in tokenizer["added_tokens"]:
        added["id"] += ORDINARY - old
    settings = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = settings.get("added_tokens_decoder", {})
    settings["added_tokens_decoder"] = {str(int(id) + ORDINARY - old): value for id, value in decoder.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (out / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    widen(parser.parse_args().out)
