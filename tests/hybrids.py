"""Small hybrids with random weights, made by transformers (tests/data/README.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from checkpoints import TINY

HYBRIDS = ("next", "qwen35", "qwen35-moe")
_DATA = Path(__file__).parent / "data"
_GOLDEN = np.load(_DATA / "hybrid.npz")


def hybrid_checkpoint(name: str, place: Path) -> Path:
    """A directory with the checkpoint and the example model's tokenizer."""
    shutil.copytree(_DATA / "hybrid" / name, place)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, place / file)
    return place


def golden(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text's ids (tokens,), some ids (n,), and transformers' logits of these, float32 (tokens, n)."""
    return _GOLDEN[f"ids-{name}"], _GOLDEN["columns"], _GOLDEN[name]
