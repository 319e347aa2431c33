"""Qwen3 in plain NumPy: the whole model in one file, written to be read.

    python examples/qwen3_in_numpy.py [CHECKPOINT] [PROMPT]

CHECKPOINT is a directory with a Hugging Face checkpoint (dense or mixture of experts); the default is the small
model beside this file. Weights become float32, nothing is fused and every intermediate result is an array that can be
printed, so this runs at a small fraction of npqwen's speed. From npqwen it takes only the config parser and the
tokenizer: npqwen's tests compare the compiled kernels with the functions below.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.format.config import Config
from npqwen.tokenizer import Tokenizer

Array = npt.NDArray[np.float32]
Weights = Mapping[str, Any]
"""float32 arrays, or whatever supports `x @ weight.T` and `weight[ids]`, by the checkpoint's tensor names."""


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of one safetensors file as float32. Supported dtypes: BF16, F16, F32, F64.

    The file is an 8-byte header length, a JSON header, then the tensors' bytes (little-endian, row-major).
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        flat: npt.NDArray[Any]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry["dtype"]])
        tensors[name] = flat.astype(np.float32).reshape(entry["shape"])
    return tensors


def read_weights(checkpoint: Path) -> dict[str, Array]:
    """All tensors of a checkpoint directory, which may be split over several files."""
    weights: dict[str, Array] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights.update(read_safetensors(file))
    return weights


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x divided by the root mean square of its last axis, times `weight`."""
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight, np.float32)


def softmax(x: Array) -> Array:
    """Softmax over the last axis. Subtracting the maximum keeps exp from overflowing."""
    e = np.exp(x - x.max(-1, keepdims=True))
    result: Array = (e / e.sum(-1, keepdims=True)).astype(np.float32)
    return result


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    activated: Array = x / (1 + np.exp(-x))
    return activated


def rope_tables(config: Config, positions: npt.NDArray[Any]) -> tuple[Array, Array]:
    """cos and sin of the rotary embedding, each (positions, head_dim / 2).

    With `rope_scaling` of type yarn in the config, low frequencies are divided by the factor, high ones kept, and those
    between interpolated (Peng et al. 2023, "YaRN", section 3.2).
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(half) / half)
    scale = 1.0
    yarn = config.yarn
    if yarn is not None:

        def dimension(rotations: float) -> float:
            """The pair of dimensions that makes `rotations` turns over the original context."""
            assert yarn is not None
            wavelength = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
            return half * math.log(wavelength) / math.log(config.rope_theta)

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


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x (tokens, heads, head_dim): element i pairs with element i + head_dim / 2."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Cache:
    """Keys and values of every layer, each (length, key/value heads, head_dim)."""

    def __init__(self, config: Config) -> None:
        empty = np.zeros((0, config.num_key_value_heads, config.head_dim), np.float32)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return len(self.keys[-1])

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        self.keys = [k[:length] for k in self.keys]
        self.values = [v[:length] for v in self.values]

    def fork(self, length: int | None = None) -> Cache:
        """A second cache with the first `length` tokens of this one (default: all)."""
        fork = copy.copy(self)
        fork.truncate(self.length if length is None else length)
        return fork


def forward(config: Config, weights: Weights, ids: Sequence[int] | npt.NDArray[Any], cache: Cache) -> Array:
    """One pass over `ids`, which follow the tokens in `cache` and are appended to it.

    Returns the hidden states after the last layer, before the final norm: (tokens, hidden_size).
    """
    past, n = cache.length, len(ids)
    cos, sin = rope_tables(config, np.arange(past, past + n, dtype=np.float32))
    # Token i sees all tokens up to itself.
    mask = np.where(np.arange(past + n) <= np.arange(past, past + n)[:, None], 0, -np.inf)
    h: Array = weights["model.embed_tokens.weight"][np.asarray(ids)]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        x = rms_norm(h, weights[layer + "input_layernorm.weight"], config.rms_norm_eps)
        h = h + attention(config, weights, i, x, cos, sin, mask, cache)
        x = rms_norm(h, weights[layer + "post_attention_layernorm.weight"], config.rms_norm_eps)
        if config.is_sparse(i):
            h = h + mixture_of_experts(config, weights, layer + "mlp.", x)
        else:
            h = h + feed_forward(weights, layer + "mlp.", x)
    return h


def attention(
    config: Config, weights: Weights, i: int, x: Array, cos: Array, sin: Array, mask: npt.NDArray[Any], cache: Cache
) -> Array:
    """Grouped-query attention of layer i, with an RMS norm of every query and key head before the rotation."""
    c, w, attn = config, weights, f"model.layers.{i}.self_attn."
    n = len(x)
    q = (x @ w[attn + "q_proj.weight"].T).reshape(n, c.num_attention_heads, c.head_dim)
    k = (x @ w[attn + "k_proj.weight"].T).reshape(n, c.num_key_value_heads, c.head_dim)
    v = (x @ w[attn + "v_proj.weight"].T).reshape(n, c.num_key_value_heads, c.head_dim)
    q = rotate(rms_norm(q, w[attn + "q_norm.weight"], c.rms_norm_eps), cos, sin)
    k = rotate(rms_norm(k, w[attn + "k_norm.weight"], c.rms_norm_eps), cos, sin)
    cache.keys[i] = np.concatenate([cache.keys[i], k])
    cache.values[i] = np.concatenate([cache.values[i], v])
    # Several query heads share a key/value head.
    group = c.num_attention_heads // c.num_key_value_heads
    keys = np.repeat(cache.keys[i], group, axis=1)
    values = np.repeat(cache.values[i], group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, keys) / np.float32(math.sqrt(c.head_dim)) + mask
    out = np.einsum("hqk,khd->qhd", softmax(scores), values).reshape(n, -1)
    projected: Array = out @ w[attn + "o_proj.weight"].T
    return projected


def feed_forward(weights: Weights, mlp: str, x: Array) -> Array:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate, up = x @ weights[mlp + "gate_proj.weight"].T, x @ weights[mlp + "up_proj.weight"].T
    down: Array = (silu(gate) * up) @ weights[mlp + "down_proj.weight"].T
    return down


def mixture_of_experts(config: Config, weights: Weights, mlp: str, x: Array) -> Array:
    """The sum of each token's best `num_experts_per_tok` experts, weighted by the router's softmax over all experts.

    With `norm_topk_prob` in the config the chosen experts' weights are scaled to a sum of 1.
    """
    mixture = config.mixture
    assert mixture is not None
    out = np.zeros_like(x)
    for t, row in enumerate(softmax(x @ weights[mlp + "gate.weight"].T)):
        chosen = np.argsort(-row, kind="stable")[: mixture.num_experts_per_tok]
        total = row[chosen].sum() if mixture.norm_topk_prob else 1.0
        for e in chosen:
            out[t] += row[e] / total * feed_forward(weights, f"{mlp}experts.{e}.", x[t : t + 1])[0]
    return out


def output_logits(config: Config, weights: Weights, h: Array) -> Array:
    """Logits (tokens, vocab_size) of hidden states (tokens, hidden_size)."""
    x = rms_norm(h, weights["model.norm.weight"], config.rms_norm_eps)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits: Array = x @ weights[name].T
    return logits


def main() -> None:
    """Continue the prompt greedily, at most 40 tokens."""
    checkpoint = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tiny-qwen3")
    prompt = sys.argv[2] if len(sys.argv) > 2 else "river (noun): a large natural"
    config, weights = Config.from_directory(checkpoint), read_weights(checkpoint)
    tokenizer, cache = Tokenizer.from_directory(checkpoint), Cache(config)
    new = tokenizer.encode(prompt)  # first the whole prompt, then one token at a time
    text = list(new)
    ends = {tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|im_end|>")}
    for _ in range(40):
        h = forward(config, weights, new, cache)
        new = [int(output_logits(config, weights, h[-1:])[0].argmax())]
        if new[0] in ends:
            break
        text += new
    print(tokenizer.decode(text))


if __name__ == "__main__":
    main()
