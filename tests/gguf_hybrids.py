"""llama.cpp's GGUF files of the small hybrids, made again from the checkpoints: byte for byte, by their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import from_bf16, read_safetensors
from gguf_files import LLAMA, rebuilt_of
from hybrid_tensors import targets

from npqwen.format.config import read_json

DATA = Path(__file__).parent / "data" / "hybrid"


def hybrid_gguf(name: str, place: Path) -> Path:
    """llama.cpp's BF16 file of one of the small hybrids."""
    path = rebuilt_of(name, llama_tensors(name), place)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == str(LLAMA[f"{name}.sha256"])
    return path


def llama_tensors(name: str) -> dict[str, np.ndarray]:
    """float32 tensors as llama.cpp's converter makes them, under GGUF's names."""
    raw = read_json(DATA / name / "config.json")
    config = raw.get("text_config", raw)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    stored = read_safetensors(DATA / name / "model.safetensors")
    for key in sorted(stored, key=_natural):
        for target in targets(key, stored[key].shape, config):
            values = target.made(from_bf16(stored[key]))
            assert values.shape == target.shape
            if target.expert is None:
                found[target.name] = values
            else:
                experts.setdefault(target.name, []).append(values)
    return found | {key: np.stack(values) for key, values in experts.items()}


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
