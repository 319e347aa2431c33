"""The NumPy reference with a converted model's weights, rounding whatever the engine rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import read_safetensors
from reference import ReferenceCache, ReferenceModel
from units import Units, read_units

from npqwen.format.config import Config, read_json


def int8_blocks(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (tokens, blocks, 32) and float32 scales (tokens, blocks) of activations x (tokens, columns)."""
    blocks = x.reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(2)
    usable = peak > 1e-30
    inverse = np.where(usable, np.float32(127) / np.where(usable, peak, 1), 0).astype(np.float32)
    return np.rint(blocks * inverse[:, :, None]).astype(np.int8), peak * np.float32(1 / 127)


class Matrix:
    """A matrix that rounds the activations it is multiplied by, as the kernels do for its encoding."""

    __array_ufunc__ = None  # x @ matrix comes here.

    def __init__(self, weights: np.ndarray, cols: int, rounds: bool) -> None:
        """weights: float32 (rows, cols rounded up to 128)."""
        self.weights, self.cols, self.rounds = weights, cols, rounds

    @property
    def T(self) -> Matrix:
        return self

    def __getitem__(self, ids: Any) -> np.ndarray:
        return self.weights[ids, : self.cols]

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        x = np.pad(x, ((0, 0), (0, self.weights.shape[1] - x.shape[1])))
        if self.rounds:
            q, scale = int8_blocks(x)
            x = (q * scale[:, :, None]).reshape(x.shape)
        product: np.ndarray = x @ self.weights.T
        return product


class _Halves(list[np.ndarray]):
    def __setitem__(self, i: Any, value: Any) -> None:
        super().__setitem__(i, value.astype(np.float16).astype(np.float32))


class QuantizedReference(ReferenceModel):
    """The reference model of a converted directory."""

    @classmethod
    def from_directory(cls, path: Path, context: int | None = None) -> QuantizedReference:
        config = Config.from_directory(path)
        weights: dict[str, Any] = {}
        stored: dict[str, np.ndarray] = {}
        for file in sorted(path.glob("*.safetensors")):
            stored |= read_safetensors(file)
        encodings = read_json(path / "config.json")["quantization_config"]["encodings"]
        for name, values in stored.items():
            if values.ndim == 1 and values.dtype != np.uint8:
                size = config.head_dim if name.split(".")[-2] in ("q_norm", "k_norm") else config.hidden_size
                weights[name] = values[:size].astype(np.float32)
            elif name in encodings:
                matrix = read_units(encodings[name], values, stored.get(name.removesuffix("weight") + "codebook"))
                weights |= _parts(config, name, matrix)
        model = cls(config, weights)
        model.bits = read_bits(path)
        return model

    def new_cache(self, room: int | None = None, adapter: str | None = None) -> ReferenceCache:
        cache = ReferenceCache(self.config)
        if self.bits != 16:
            arrays = cache.arrays
            arrays.keys, arrays.values = _Halves(arrays.keys), _Halves(arrays.values)
        return cache


def read_bits(path: Path) -> int:
    """`bits` in the config.json of a converted directory."""
    return int(read_json(path / "config.json")["quantization_config"]["bits"])


def _parts(c: Config, name: str, stored: Units) -> dict[str, Any]:
    """A converted matrix under the checkpoint's names, without padding."""
    part = name.split(".")[-2]
    weights = stored.weights
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    cols = {"o_proj": queries, "down_proj": c.intermediate_size}.get(part, c.hidden_size)

    def matrix(rows: np.ndarray) -> Matrix:
        return Matrix(rows, cols, stored.encoding != "bf16")

    if part == "qk_proj":
        return {name.replace("qk", "q"): matrix(weights[:queries]), name.replace("qk", "k"): matrix(weights[queries:])}
    if part == "gate_up_proj":
        both = weights.reshape(-1, 2, 16, weights.shape[1])
        return {
            name.replace("gate_up", which): matrix(both[:, i].reshape(-1, weights.shape[1])[: c.intermediate_size])
            for i, which in enumerate(("gate", "up"))
        }
    rows = {"o_proj": c.hidden_size, "down_proj": c.hidden_size, "v_proj": keys}.get(part, c.vocab_size)
    return {name: matrix(weights[:rows])}
