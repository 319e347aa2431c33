#!/usr/bin/env python3
"""What it costs to keep a text to a structure: filling and applying masks, beside a decode step of the same run.

    python tests/bench/make_checkpoint.py 0.6B build/bench/0.6B
    npqwen convert build/bench/0.6B build/bench/0.6B-int4
    chrt -f 5 python tests/bench/mask_cost.py build/bench/0.6B-int4 --threads 2

MODEL is a converted directory with the vocabulary of Qwen3, 151,936. Its tokenizer, which may be small, is padded to
as many tokens: random merges of its own. Texts are drawn from random logits under each structure; a table has the
median and the 99th percentile of what the structure adds to a step (the mask, its application, and taking the token),
and the median's share of a decode step. Forced tokens are not drawn; one run of them counts once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npqwen.generation.sampler import Sampler
from npqwen.generation.sampling import Sampling
from npqwen.structure.structure import Structure, check_schema
from npqwen.structure.vocabulary import Vocabulary
from npqwen.tokenizer import Tokenizer

VOCABULARY = 151_936
STRUCTURES: dict[str, dict[str, Any]] = {
    "any object": {"schema": True},
    "nested schema": {
        "schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
                "kind": {"enum": ["a", "b", "other"]},
                "address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}},
            },
            "required": ["name", "age", "tags", "kind"],
        }
    },
    "regex": {"regex": r"(\w+ ){3,30}\d{4}-\d{2}"},
    "Lark": {"grammar": 'start: (WORD " ")* "."\nWORD: /[a-z]+/'},
}


def padded(tokenizer: Path) -> Tokenizer:
    """The tokenizer with VOCABULARY tokens: random ones are added, each the merge of two others."""
    from tokenizers import Tokenizer as Library

    state = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = state["model"]
    added = {one["id"] for one in state["added_tokens"]}
    vocab, rng = dict(model["vocab"]), np.random.default_rng(0)
    taken = set(vocab.values()) | added
    pieces = [piece for piece in vocab if len(piece) < 8]
    later = [piece for piece in pieces if not piece.startswith(("Ġ", "Ċ"))]  # blanks only begin tokens
    free = (id for id in range(VOCABULARY - 300) if id not in taken)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    for id in free:
        while "".join(merge := (pieces[rng.integers(len(pieces))], later[rng.integers(len(later))])) in vocab:
            pass
        vocab["".join(merge)] = id
        merges.append(merge)
    model["vocab"], model["merges"] = vocab, [" ".join(merge) for merge in merges]
    return Tokenizer(Library.from_str(json.dumps(state)))


def steps(vocabulary: Vocabulary, options: dict[str, Any], eos: int, texts: int) -> Iterator[tuple[float, bool]]:
    """Seconds of each step of texts drawn under a structure, and whether its token was forced."""
    structure = Structure.of(options)
    assert structure is not None
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(VOCABULARY, np.float32)
    for text in range(texts):
        constraint = vocabulary.constraint(structure)
        sampler = Sampler(Sampling(temperature=0.6, top_k=20, top_p=0.95, seed=text))
        for _ in range(200):
            rng.shuffle(logits[: VOCABULARY // 8])
            start = time.perf_counter()
            forced = constraint.forced()
            seconds = time.perf_counter() - start
            if forced:
                start = time.perf_counter()
                for id in forced:
                    constraint.push(id)
                yield seconds + time.perf_counter() - start, True
            if constraint.ended:
                break
            start = time.perf_counter()
            drawn = sampler(logits, constraint.allowed())
            with_mask = time.perf_counter() - start
            start = time.perf_counter()
            sampler(logits)
            without = time.perf_counter() - start
            if drawn == eos:
                break
            start = time.perf_counter()
            constraint.push(drawn)
            yield seconds + with_mask - without + time.perf_counter() - start, False


def decode_seconds(model: Path, threads: int | None, count: int) -> float:
    """The median seconds of a decode step."""
    from npqwen.model import load

    with load(model, threads=threads, context=1024) as loaded:
        cache = loaded.new_cache()
        loaded.prefill(np.arange(64, dtype=np.int32), cache)
        times = []
        for id in range(count):
            start = time.perf_counter()
            loaded.forward(np.array([id], np.int32), cache)
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--texts", type=int, default=10)
    given = parser.parse_args(args)
    start = time.perf_counter()
    tokenizer = padded(given.model / "tokenizer.json")
    eos = tokenizer.token_id("<|im_end|>")
    assert eos is not None
    print(f"tokenizer of {len(tokenizer):,} tokens made in {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    vocabulary = Vocabulary(tokenizer, VOCABULARY, {eos})
    print(f"vocabulary made in {time.perf_counter() - start:.2f} s")
    step = decode_seconds(given.model, given.threads, 60)
    print(f"decode step: {1e3 * step:.2f} ms\n")
    print("| structure | drawn | forced | first mask, ms | median, us | 99%, us | share of a step |")
    print("|---|---|---|---|---|---|---|")
    for name, options in STRUCTURES.items():
        if "schema" in options:
            options = {"schema": check_schema("schema", options["schema"])}
        start = time.perf_counter()
        structure = Structure.of(options)
        assert structure is not None
        vocabulary.constraint(structure)
        first = time.perf_counter() - start
        found = list(steps(vocabulary, options, eos, given.texts))
        drawn = np.array([seconds for seconds, forced in found if not forced])
        median, high = np.percentile(drawn, [50, 99])
        print(
            f"| {name} | {len(drawn)} | {len(found) - len(drawn)} | {1e3 * first:.1f} | {1e6 * median:.0f} | "
            f"{1e6 * high:.0f} | {100 * median / step:.2f} % |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
