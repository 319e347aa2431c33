#!/usr/bin/env python3
"""What models take on disk and in memory, at the real models' shapes: computed as `npqwen info` does, not measured.

    python tests/bench/memory_table.py [--context 8192] [--threads 4]

Sizes of files are those of the converter's plan: every matrix in the encoding that its recipe gives it, with scales,
codebooks and padding. Buffers are those that a model of one layer allocates, whose file has a header but no data.
Prints the Markdown table of docs/models.md (tests/test_memory_table.py compares).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_checkpoint import SIZES, tensors
from npqwen_quant.plan import plan

from npqwen.engine.budget import RESERVED, Budget
from npqwen.engine.buffers import Buffers
from npqwen.engine.engine import chunk_size
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.recurrent_states import states_bytes
from npqwen.engine.weights import Weights
from npqwen.format.config import Config
from npqwen.format.quantization import FORMAT_VERSION, Quantization
from npqwen.format.recipe import recipe_of
from npqwen.format.safetensors import make_header

CONTEXT, THREADS = 8192, 4
HEADER = "| model | `--bits` | download | on disk | KV cache, 8,192 tokens | memory needed |\n|---|--:|--:|--:|--:|--:|"


@dataclass(frozen=True)
class Needs:
    """Bytes of a model at some bits, on disk and in memory."""

    name: str
    bits: int
    download: int
    """Of the bf16 checkpoint."""
    weights: int
    """Of the converted model, on disk as in memory: the files are mapped."""
    cache: int
    """Of a full context: keys and values, and a hybrid's states."""
    working: int
    """Buffers of the forward pass."""

    @property
    def needed(self) -> int:
        """Everything: also Python, Numba and the kernels."""
        return self.weights + self.cache + self.working + RESERVED

    def row(self) -> str:
        """A row of the table, in powers of ten."""
        sizes = self.download, self.weights, self.cache, self.needed
        return f"| {self.name} | {self.bits} | {' | '.join(f'{size / 1e9:.1f} GB' for size in sizes)} |"


def hollow(directory: Path, raw: Mapping[str, Any], bits: int) -> Config:
    """Write a converted model without data; returns its config. raw: its config.json."""
    config = Config.from_dict(raw)
    recipe = recipe_of(bits)
    planned = plan(config, recipe)
    encodings = {t.tensor.name: t.encoding for t in planned if t.encoding is not None and t.sources}
    header = make_header(
        [(t.name, t.dtype, t.shape) for t in planned], {"format": "npqwen", "format_version": str(FORMAT_VERSION)}
    )
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(t.nbytes for t in planned))
    (directory / "config.json").write_text(json.dumps({**raw, **Quantization(recipe, encodings).as_dict()}))
    return config


def whole(name: str) -> dict[str, Any]:
    """config.json of a model of `make_checkpoint.SIZES`, with the draft layer that Qwen's hybrids have."""
    raw = dict(SIZES[name])
    return raw if Config.from_dict(raw).recurrence is None else raw | {"mtp_num_hidden_layers": 1}


def four_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in a hybrid's config.json if it has four layers."""
    return {"num_hidden_layers": 4, "layer_types": raw["layer_types"][:4]}


def needs(name: str, bits: int, context: int = CONTEXT, threads: int = THREADS) -> Needs:
    """What a model of `make_checkpoint.SIZES` takes."""
    raw = whole(name)
    config = Config.from_dict(raw)
    with tempfile.TemporaryDirectory() as place:
        # A hybrid's fourth layer is the first with attention.
        few = {"num_hidden_layers": 1} if config.recurrence is None else four_layers(raw)
        layer = hollow(Path(place), {**raw, **few}, bits)
        weights = Weights(Path(place), layer)
        budget = Budget(
            weights=sum(planned.nbytes for planned in plan(config, recipe_of(bits))),
            working=Buffers(layer, weights, threads, chunk_size(layer), context).nbytes,
            page=KVCache(config, 1, weights.cache_type).page_bytes,
            available=None,
            states=states_bytes(config),
        )
        weights.close()
    download = 2 * sum(math.prod(shape) for _, shape in tensors(raw))
    return Needs(name, bits, download, budget.weights, budget.cache(context), budget.working)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens")
    parser.add_argument("--threads", type=int, default=THREADS)
    options = parser.parse_args()
    print(HEADER.replace(f"{CONTEXT:,}", f"{options.context:,}"))
    for name in SIZES:
        for bits in (3, 4, 8, 16):
            print(needs(name, bits, options.context, options.threads).row())


if __name__ == "__main__":
    main()
