"""Small hybrids with random weights, made by transformers (tests/data/README.md)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from checkpoints import TINY, read_safetensors, to_bf16, write_safetensors

HYBRIDS = ("next", "qwen35", "qwen35-moe")
_DATA = Path(__file__).parent / "data"
_GOLDEN = np.load(_DATA / "hybrid.npz")


def hybrid_checkpoint(name: str, place: Path) -> Path:
    """A directory with the checkpoint and the example model's tokenizer.

    name: of `HYBRIDS`, perhaps followed by "+draft" for one with a draft layer; or "mtp", which is trained and has one.
    """
    own, _, draft = name.partition("+")
    shutil.copytree(_DATA / "hybrid" / own, place)
    if draft:
        add_draft_layer(place)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, place / file)
    return place


def golden(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text's ids (tokens,), some ids (n,), and transformers' logits of these, float32 (tokens, n)."""
    return _GOLDEN[f"ids-{name}"], _GOLDEN["columns"], _GOLDEN[name]


def draft_tensors(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a draft layer for a hybrid of `HYBRIDS` with these tensors, bf16 as its bits.

    The layer itself is a copy of the last one; what is around it is random.
    """
    rng = np.random.default_rng(7)
    of_last = ((name, name.partition("layers.3.")[2]) for name in stored)
    found = {f"mtp.layers.0.{own}": stored[name] for name, own in of_last if own}
    size = len(found["mtp.layers.0.input_layernorm.weight"])
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        found[f"mtp.{name}.weight"] = to_bf16(0.3 * rng.standard_normal(size))
    found["mtp.fc.weight"] = to_bf16(rng.standard_normal((size, 2 * size)) / np.sqrt(2 * size))
    return found


def add_draft_layer(checkpoint: Path, without: str = "") -> None:
    """Give a checkpoint of `HYBRIDS` a draft layer. without: the name of a tensor that is left out."""
    stored = read_safetensors(checkpoint / "model.safetensors")
    stored |= draft_tensors(stored)
    stored.pop(without, None)
    write_safetensors(checkpoint / "model.safetensors", stored)
