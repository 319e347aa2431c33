#!/usr/bin/env python3
"""Write what sentence-transformers and transformers make of the tests' embedding model and reranker: retrieval.npz.

    python -m pip install 'sentence-transformers>=6' torch
    python tests/data/make_retrieval.py

All in float32. documents, queries: vectors (texts, 256) of sentence-transformers, queries with the prompt "query";
cut_k: those of documents, cut to k numbers. scores: (queries, documents), as the card of Qwen3-Reranker computes them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from retrieval_checkpoints import (  # noqa: E402
    CONTEXT,
    DEFINITIONS,
    INSTRUCTION,
    NO,
    QUERIES,
    YES,
    embedding_checkpoint,
    reranker_checkpoint,
)

BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def main() -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arrays = {}
    with tempfile.TemporaryDirectory() as place:
        path = embedding_checkpoint(Path(place, "embedding"))
        model = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        model.max_seq_length = CONTEXT
        arrays["documents"] = model.encode(list(DEFINITIONS), normalize_embeddings=True)
        arrays["queries"] = model.encode(list(QUERIES), prompt_name="query", normalize_embeddings=True)
        for size in (32, 100):
            arrays[f"cut_{size}"] = model.encode(list(DEFINITIONS), truncate_dim=size, normalize_embeddings=True)
        path = reranker_checkpoint(Path(place, "reranker"))
        tokenizer = AutoTokenizer.from_pretrained(path)
        causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        before = tokenizer.encode(BEFORE, add_special_tokens=False)
        after = tokenizer.encode(AFTER, add_special_tokens=False)

        def score(query: str, document: str) -> float:
            text = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
            room = CONTEXT - len(before) - len(after)
            ids = before + tokenizer(text, truncation="longest_first", max_length=room)["input_ids"] + after
            with torch.no_grad():
                logits = causal(input_ids=torch.tensor([ids])).logits[0, -1]
            return float(torch.nn.functional.log_softmax(logits[[NO, YES]], 0)[1].exp())

        arrays["scores"] = np.array([[score(query, each) for each in DEFINITIONS] for query in QUERIES], np.float32)
    np.savez_compressed(HERE / "retrieval.npz", **arrays)


if __name__ == "__main__":
    main()
