"""Qwen3 in plain NumPy float32: the oracle that the tests compare npqwen with.

It reads a Hugging Face checkpoint's own safetensors and shares nothing with the package but `Config`,
`Tokenizer` and the generation loop, which can drive it in place of a `Model`.  Slow on purpose: one line of
code for each line of the paper.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npqwen.errors import ContextLengthError
from npqwen.format.config import Config


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file as float32 (BF16, F16, F32 and F64 are known)."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry["dtype"]])
        tensors[name] = flat.astype(np.float32).reshape(entry["shape"])
    return tensors


def rope_tables(config: Config, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (positions, head_dim / 2) float32, with YaRN if the config asks for it."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(half) / half)
    scale = 1.0
    yarn = config.yarn
    if yarn is not None:

        def dimension(rotations: float) -> float:
            """The pair that turns `rotations` times over the original context."""
            assert yarn is not None
            wave = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
            return half * math.log(wave) / math.log(config.rope_theta)

        low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_dim - 1)
        if low == high:
            high += 0.001
        stretch = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        frequency = frequency * (1 - stretch) + frequency / yarn.factor * stretch
        scale = yarn.attention_factor or 0.1 * math.log(max(yarn.factor, 1)) + 1
    angle = positions[:, None] * frequency.astype(np.float32)
    return (np.cos(angle) * scale).astype(np.float32), (np.sin(angle) * scale).astype(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on (tokens, heads, head_dim); element i turns with element i + head_dim / 2."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class ReferenceCache:
    """Keys and values of every layer, (length, kv_heads, head_dim) float32 each."""

    def __init__(self, config: Config, limit: int = 1 << 31) -> None:
        self.limit = limit
        empty = np.zeros((0, config.num_key_value_heads, config.head_dim), np.float32)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    @property
    def length(self) -> int:
        return len(self.keys[-1])

    def truncate(self, length: int) -> None:
        self.keys = [k[:length] for k in self.keys]
        self.values = [v[:length] for v in self.values]

    def fork(self, length: int | None = None) -> ReferenceCache:
        fork = copy.copy(self)
        fork.truncate(self.length if length is None else length)
        return fork


class ReferenceModel:
    """A dense Qwen3 with the interface of `npqwen.model.Model`.

    weights: the checkpoint's tensors under their own names, float32 (so a test may hand in weights that went
    through a quantizer).
    """

    bits = 32
    weight_bytes = 0

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, np.ndarray],
        path: Path | None = None,
        context: int | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.context = context or config.max_position_embeddings
        if path is not None:
            from npqwen.generation.generation_config import GenerationConfig
            from npqwen.tokenizer import Tokenizer

            self.path = path
            self.tokenizer = Tokenizer.from_directory(path)
            self.generation = GenerationConfig.from_directory(path)

    @classmethod
    def from_directory(cls, path: Path, context: int | None = None) -> ReferenceModel:
        weights: dict[str, np.ndarray] = {}
        for file in sorted(path.glob("*.safetensors")):
            weights.update(read_safetensors(file))
        return cls(Config.from_directory(path), weights, path, context)

    def new_cache(self, room: int | None = None) -> ReferenceCache:
        return ReferenceCache(self.config, room or self.context)

    def forward(self, ids: Any, cache: ReferenceCache, *, all_logits: bool = False, out: Any = None) -> np.ndarray:
        c, w = self.config, self.weights
        ids = np.asarray(ids)
        past, n = cache.length, len(ids)
        if past + n > self.context:
            raise ContextLengthError(f"{past + n} tokens do not fit the context of {self.context}")
        cos, sin = rope_tables(c, np.arange(past, past + n, dtype=np.float32))
        mask = np.where(np.arange(past + n) <= np.arange(past, past + n)[:, None], 0, -np.inf)
        group = c.num_attention_heads // c.num_key_value_heads
        h = w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}."
            attn, mlp = layer + "self_attn.", layer + "mlp."
            x = rms_norm(h, w[layer + "input_layernorm.weight"], c.rms_norm_eps)
            q = (x @ w[attn + "q_proj.weight"].T).reshape(n, c.num_attention_heads, c.head_dim)
            k = (x @ w[attn + "k_proj.weight"].T).reshape(n, c.num_key_value_heads, c.head_dim)
            v = (x @ w[attn + "v_proj.weight"].T).reshape(n, c.num_key_value_heads, c.head_dim)
            q = rotate(rms_norm(q, w[attn + "q_norm.weight"], c.rms_norm_eps), cos, sin)
            k = rotate(rms_norm(k, w[attn + "k_norm.weight"], c.rms_norm_eps), cos, sin)
            cache.keys[i] = np.concatenate([cache.keys[i], k])
            cache.values[i] = np.concatenate([cache.values[i], v])
            keys = np.repeat(cache.keys[i], group, axis=1)
            values = np.repeat(cache.values[i], group, axis=1)
            scores = np.einsum("qhd,khd->hqk", q, keys) / np.float32(math.sqrt(c.head_dim)) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
            out = np.einsum("hqk,khd->qhd", scores, values).reshape(n, -1)
            h = h + out @ w[attn + "o_proj.weight"].T
            x = rms_norm(h, w[layer + "post_attention_layernorm.weight"], c.rms_norm_eps)
            h = h + (self._mixture(x, mlp) if c.is_sparse(i) else self._feed_forward(x, mlp))
        if not all_logits:
            h = h[-1:]
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        return rms_norm(h, w["model.norm.weight"], c.rms_norm_eps) @ w[head].T

    def _feed_forward(self, x: np.ndarray, mlp: str) -> np.ndarray:
        w = self.weights
        gate, up = x @ w[mlp + "gate_proj.weight"].T, x @ w[mlp + "up_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ w[mlp + "down_proj.weight"].T

    def _mixture(self, x: np.ndarray, mlp: str) -> np.ndarray:
        """Softmax over all experts, then the top k, then (norm_topk_prob) divided by their sum."""
        mixture = self.config.mixture
        assert mixture is not None
        scores = x @ self.weights[mlp + "gate.weight"].T
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for t, row in enumerate(weights):
            chosen = np.argsort(-row, kind="stable")[: mixture.num_experts_per_tok]
            total = row[chosen].sum() if mixture.norm_topk_prob else 1.0
            for e in chosen:
                out[t] += row[e] / total * self._feed_forward(x[t : t + 1], f"{mlp}experts.{e}.")[0]
        return out

    def prefill(
        self, ids: Any, cache: ReferenceCache, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        for start in range(0, len(ids), 64):
            part = ids[start : start + 64]
            logits = self.forward(part, cache)
            if progress is not None:
                progress(start + len(part), len(ids))
        return logits[-1]

    def logits(self, ids: Any) -> np.ndarray:
        return self.forward(ids, self.new_cache(), all_logits=True)

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        from npqwen.generation import generate as text

        return text.stream(self, prompt, **options)

    def generate(self, prompt: str, **options: Any) -> Any:
        from npqwen.generation import generate as text

        return text.generate(self, prompt, **options)

    def close(self) -> None:
        pass
