#!/usr/bin/env python3
"""What fewer bits cost an embedding model or a reranker: vectors, scores and their order, beside those of 16 bits.

    python tests/bench/retrieval_precision.py CHECKPOINT TEXTS --queries 40 --bits 8,4,3

CHECKPOINT is the directory of a Qwen3-Embedding or Qwen3-Reranker. TEXTS has a document on each line; every tenth is a
query instead, up to --queries. Prints a Markdown table: cosine similarity of each vector with its own at 16 bits (mean
and least), or the difference of scores; Spearman's rank correlation over the documents of each query (mean and least);
how often the best document is the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from npqwen_quant import convert
from numpy.typing import NDArray

import npqwen

Floats = NDArray[np.float32]


def ranks(rows: Floats) -> NDArray[np.float64]:
    """The ranks within each row, as numbers to be correlated."""
    return np.argsort(np.argsort(rows, axis=1), axis=1).astype(np.float64)


def spearman(first: Floats, second: Floats) -> NDArray[np.float64]:
    """The rank correlation of each row."""
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(ranks(first), ranks(second), strict=True)])


def measured(model: npqwen.Model, queries: list[str], documents: list[str]) -> tuple[Floats, Floats]:
    """Vectors, or scores; and the similarities by which documents are ranked, (queries, documents)."""
    if model.task == "reranking":
        scores = np.stack([model.rerank(query, documents).scores for query in queries])
        return scores, scores
    vectors = model.embed(queries, instruction=True), model.embed(documents)
    return np.concatenate(vectors), vectors[0] @ vectors[1].T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--bits", default="8,4,3")
    options = parser.parse_args()
    lines = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    queries = lines[::10][: options.queries]
    documents = [line for at, line in enumerate(lines) if at % 10][: options.documents]
    exact: tuple[Floats, Floats] | None = None
    print(f"{len(queries)} queries, {len(documents)} documents\n")
    print("| bits | cosine, or difference of scores | Spearman | same best |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for bits in [16, *map(int, options.bits.split(","))]:
            path = Path(place, f"{options.checkpoint.name}-{bits}")
            convert(options.checkpoint, path, bits=bits)
            with npqwen.load(path) as model:
                values, pairs = measured(model, queries, documents)
                reranks = model.task == "reranking"
            if exact is None:
                exact = values, pairs
                continue
            if reranks:
                apart = np.abs(values - exact[0])
                what = f"{apart.mean():.4f}, at most {apart.max():.4f}"
            else:
                cosines = (values * exact[0]).sum(1)
                what = f"{cosines.mean():.5f}, at least {cosines.min():.5f}"
            order = spearman(pairs, exact[1])
            same = (pairs.argmax(1) == exact[1].argmax(1)).mean()
            print(f"| {bits} | {what} | {order.mean():.4f}, at least {order.min():.4f} | {same:.0%} |", flush=True)


if __name__ == "__main__":
    main()
