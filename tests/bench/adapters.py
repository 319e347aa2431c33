"""What a LoRA adapter costs: decoding and prefill with and without one, taking turns.

    python tests/bench/adapters.py MODEL [--rank N] [--threads N] [--rounds N] [--prefill N] [--batch N]

MODEL: a converted directory; random weights will do. The adapter is random, of all linear layers but experts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from npqwen.engine.kv_cache import KVCache
from npqwen.engine.piece import Piece
from npqwen.format.config import Config
from npqwen.format.layout import Layout, Matrix
from npqwen.format.safetensors import make_header
from npqwen.format.split_matrices import whole
from npqwen.model import Model, load

TOKENS = 24
"""Steps of decoding in a turn."""


def write_adapter(directory: Path, config: Config, rank: int) -> Path:
    """A random adapter of all linear layers, in PEFT's files."""
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(config.num_hidden_layers):
        layer = Layout(config).layer(i).items()
        matrices = [tensor for role, tensor in layer if isinstance(tensor, Matrix) and role != "router"]
        shapes = {name: shape for matrix in matrices for name, shape in matrix.sources.items()}
        for name, (rows, columns) in whole(shapes, f"model.layers.{i}", config).items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, columns)) / np.sqrt(columns)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank)) / rank / 10
    stored = {name: tensor.astype("<f4") for name, tensor in tensors.items()}
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    with open(directory / "adapter_model.safetensors", "wb") as file:
        file.write(make_header(((name, "F32", tensor.shape) for name, tensor in stored.items()), {}))
        for tensor in stored.values():
            file.write(tensor.tobytes())
    return directory


def decode(model: Model, caches: list[KVCache]) -> float:
    """Tokens per second of all texts together, a token of each in a pass."""
    rows = model.new_logits(len(caches) + 16)
    start = time.perf_counter()
    for step in range(TOKENS):
        ids = np.array([5 + step], np.int64)
        for cache in caches:
            cache.reserve(1)
        model.forward_pieces([Piece(ids, cache, 1) for cache in caches], rows)
    return TOKENS * len(caches) / (time.perf_counter() - start)


def prefill(model: Model, adapter: str | None, tokens: int) -> float:
    """Tokens of a prompt per second."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, tokens)
    cache = model.new_cache(tokens, adapter)
    start = time.perf_counter()
    model.prefill(ids, cache)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = write_adapter(Path(place), Config.from_directory(options.model), options.rank)
        adapters = {"a": directory, "b": directory}
        with load(options.model, threads=options.threads, context=2048, adapters=adapters) as model:
            compare(model, options)


def compare(model: Model, options: argparse.Namespace) -> None:
    """Print the medians of interleaved turns."""

    def caches(*adapters: str | None) -> list[KVCache]:
        found = [model.new_cache(64 + TOKENS, name) for name in adapters]
        for cache in found:
            model.prefill(list(range(5, 69)), cache)
        return found

    size = options.batch
    measures: dict[str, list[tuple[str, Callable[[], float]]]] = {
        "one text": [
            ("none", lambda: decode(model, caches(None))),
            ("adapter", lambda: decode(model, caches("a"))),
        ],
        f"{size} texts": [
            ("none", lambda: decode(model, caches(*[None] * size))),
            ("one adapter", lambda: decode(model, caches(*["a"] * size))),
            ("two and none", lambda: decode(model, caches(*(["a", None, "b", "a"] * size)[:size]))),
        ],
        f"prompt of {options.prefill}": [
            ("none", lambda: prefill(model, None, options.prefill)),
            ("adapter", lambda: prefill(model, "a", options.prefill)),
        ],
    }
    print(f"{model.name}, {model.threads} threads, rank {options.rank}: {model.adapters['a'].nbytes / 1e6:.1f} MB")
    for what, contenders in measures.items():
        found: dict[str, list[float]] = {name: [] for name, _ in contenders}
        for number in range(options.rounds + 1):
            for name, measure in contenders:
                rate = measure()
                if number:  # the first turn warms up
                    found[name].append(rate)
        base = median(found["none"])
        for name, rates in found.items():
            print(f"{what:>16}  {name:<13}{median(rates):8.1f} tokens/s  {median(rates) / base:.3f}", flush=True)


if __name__ == "__main__":
    main()
