"""The unquantized model, half a layer at a time, in float32: its outputs, and the moments of its matrices' inputs.

Hidden states of the calibration text (sequences, tokens, hidden_size) go through a layer's attention or feed-forward,
batch by batch, while the second moments of every matrix's inputs are accumulated. Gated DeltaNet layers, which hybrids
have in place of attention, are in delta_moments.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.engine.rope import Rope
from npqwen.errors import CheckpointError
from npqwen.format.config import Config
from npqwen_quant.search import F32
from npqwen_quant.tensors import SourceTensor

Load = Callable[[str], F32]
"""Reads a tensor of the checkpoint, by its name without the layer's prefix."""

_BATCH = 2048
"""Tokens at a time: enough for fast products."""

_LARGEST = 1e17
"""Bound of hidden states: float32 holds their squares, and the sums of these."""

NONE = 0
"""A value of `widest` with which no moments are accumulated: only the hidden states advance."""


class Moments:
    """A sum of x^T x over inputs x, in groups of columns if there are many. widest: the most columns of a group."""

    def __init__(self, columns: int, widest: int) -> None:
        self.count = 0
        self.bounds: list[tuple[int, int]] = []
        self.sums: list[F32] = []
        if widest == NONE:
            return
        groups = -(-columns // widest)
        width = -(-columns // groups // 32) * 32
        self.bounds = [(start, min(start + width, columns)) for start in range(0, columns, width)]
        self.sums = [np.zeros((stop - start, stop - start), np.float32) for start, stop in self.bounds]

    def add(self, x: F32) -> None:
        """Add inputs x (..., columns)."""
        flat = x.reshape(-1, x.shape[-1])
        for (start, stop), total in zip(self.bounds, self.sums, strict=True):
            part = np.ascontiguousarray(flat[:, start:stop])
            total += part.T @ part
        self.count += len(flat)


def embedded(embedding: SourceTensor, ids: npt.NDArray[Any]) -> F32:
    """The rows of the embedding (..., hidden_size) of token ids (...).

    Raises CheckpointError for an id without a row, or for weights that cannot be read or are not finite.
    """
    table, inverse = np.unique(ids, return_inverse=True)
    for token in (table[0], table[-1]):
        if not 0 <= token < embedding.shape[0]:
            raise CheckpointError(
                f"{embedding.path} has {embedding.shape[0]} embeddings, but the text has token id {token}; is its "
                "tokenizer.json another model's?"
            )
    rows = np.concatenate([embedding.floats(int(token), 1) for token in table])
    return rows[inverse.reshape(ids.shape)]


def check_states(hidden: F32, checkpoint: Path) -> None:
    """CheckpointError for hidden states that overflow float32 in the next norm, or are NaN."""
    if not max(float(hidden.max(initial=0)), -float(hidden.min(initial=0))) < _LARGEST:
        raise CheckpointError(f"{checkpoint} computes hidden states that overflow float32; is it broken?")


def norm(x: F32, weight: F32, config: Config) -> F32:
    """RMS norm over the last axis."""
    mean_square = (x * x).mean(-1, keepdims=True, dtype=np.float32)
    normed = np.asarray(x / np.sqrt(mean_square + np.float32(config.rms_norm_eps)), np.float32)
    normed *= weight
    return normed


def batches(hidden: F32) -> Iterator[F32]:
    """Views of the hidden states of some sequences at a time."""
    step = max(1, _BATCH // hidden.shape[1])
    for first in range(0, len(hidden), step):
        yield hidden[first : first + step]


def silu(x: F32) -> F32:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # for a large negative x, exp(-x) is infinite and the quotient is 0
        activated: F32 = x / (1 + np.exp(-x))
    return activated


def sigmoid(x: F32) -> F32:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # as in silu
        return np.asarray(np.float32(1) / (1 + np.exp(-x)), np.float32)


def attention(config: Config, load: Load, hidden: F32, widest: int) -> dict[str, Moments]:
    """Add the attention's output to the hidden states, in place. Returns moments by the names of matrices."""
    c = config
    gated = c.recurrence is not None
    inward = ["q_proj", "k_proj", "v_proj", *(["q_gate"] if gated else [])]
    w = {part: load(f"self_attn.{part}.weight") for part in (*inward, "o_proj", "q_norm", "k_norm")}
    before = load("input_layernorm.weight")
    inputs, outputs = Moments(c.hidden_size, widest), Moments(c.num_attention_heads * c.head_dim, widest)
    tokens = hidden.shape[1]
    cos, sin = (table[:, None] for table in Rope(c).tables(0, tokens))
    group = c.num_attention_heads // c.num_key_value_heads
    mask = np.where(np.arange(tokens) <= np.arange(tokens)[:, None], 0, -np.inf).astype(np.float32)

    def heads(x: F32, name: str, count: int) -> F32:
        """(count, tokens, head_dim)."""
        y = norm(x.reshape(tokens, count, c.head_dim), w[name], c)
        a, b, rest = np.split(y, [c.rotary_dim // 2, c.rotary_dim], -1)
        rotated: F32 = np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
        turned: F32 = rotated.transpose(1, 0, 2)
        return turned

    for batch in batches(hidden):
        x = norm(batch, before, c)
        inputs.add(x)
        q, k, v = (x @ w[name].T for name in ("q_proj", "k_proj", "v_proj"))
        mixed = np.empty((*batch.shape[:2], c.num_attention_heads * c.head_dim), np.float32)
        for i in range(len(batch)):
            queries = heads(q[i], "q_norm", c.num_attention_heads) / np.float32(math.sqrt(c.head_dim))
            keys = heads(k[i], "k_norm", c.num_key_value_heads)
            values = v[i].reshape(tokens, c.num_key_value_heads, c.head_dim).transpose(1, 0, 2)
            for head in range(c.num_attention_heads):
                scores = queries[head] @ keys[head // group].T + mask
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                scores /= scores.sum(-1, keepdims=True)
                mixed[i, :, head * c.head_dim : (head + 1) * c.head_dim] = scores @ values[head // group]
        if gated:
            mixed *= sigmoid(x @ w["q_gate"].T)
        outputs.add(mixed)
        batch += mixed @ w["o_proj"].T
    return {f"self_attn.{part}.weight": inputs for part in inward} | {"self_attn.o_proj.weight": outputs}


def feed_forward(config: Config, load: Load, hidden: F32, widest: int) -> dict[str, Moments]:
    """Add a dense feed-forward's output to the hidden states, in place. Returns moments by the names of matrices."""
    names = _names("mlp.")
    gate, up, down = (load(name) for name in names)
    before = load("post_attention_layernorm.weight")
    inputs, inner = Moments(config.hidden_size, widest), Moments(config.intermediate_size, widest)
    for batch in batches(hidden):
        x = norm(batch, before, config)
        inputs.add(x)
        activated = silu(x @ gate.T) * (x @ up.T)
        inner.add(activated)
        batch += activated @ down.T
    return dict(zip(names, (inputs, inputs, inner), strict=True))


def last(config: Config, load: Load, hidden: F32, widest: int) -> Moments:
    """The moments of the output matrix's inputs. load: reads a tensor by its full name."""
    weight, inputs = load("model.norm.weight"), Moments(config.hidden_size, widest)
    for batch in batches(hidden):
        inputs.add(norm(batch, weight, config))
    return inputs


def mixture(config: Config, load: Load, hidden: F32, widest: int) -> Iterator[dict[str, Moments]]:
    """Add a mixture's output to the hidden states, in place.

    Yields the moments of the shared expert, if there is one, and of every other expert, by the names of its matrices.
    They are those of the tokens routed to it plus, with the weight of _PRIOR tokens, those of all tokens of the layer.
    Yields nothing if no moments are accumulated.
    """
    mixture = config.mixture
    assert mixture is not None
    size = config.hidden_size
    before, router = load("post_attention_layernorm.weight"), load("mlp.gate.weight")
    x = np.concatenate([norm(batch, before, config).reshape(-1, size) for batch in batches(hidden)])
    logits = x @ router.T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : mixture.num_experts_per_tok]
    logits = np.exp(logits - logits.max(1, keepdims=True))
    share = np.take_along_axis(logits / logits.sum(1, keepdims=True), chosen, 1)
    if mixture.norm_topk_prob:
        share /= share.sum(1, keepdims=True)
    out = np.zeros_like(x)
    every_inner = Moments(mixture.moe_intermediate_size, widest)
    every = Moments(size, widest)
    for start in range(0, len(x), _BATCH):
        every.add(x[start : start + _BATCH])

    def run(expert: int, with_output: bool) -> tuple[F32, F32]:
        """The inputs routed to the expert, and its activations."""
        tokens, place = np.nonzero(chosen == expert)
        gate, up = (load(f"mlp.experts.{expert}.{part}_proj.weight") for part in ("gate", "up"))
        reached = x[tokens]
        activated = np.asarray(silu(reached @ gate.T) * (reached @ up.T), np.float32)
        if with_output:
            down = load(f"mlp.experts.{expert}.down_proj.weight")
            out[tokens] += share[tokens, place][:, None] * (activated @ down.T)
        return reached, activated

    shared = None
    if mixture.shared_expert_intermediate_size:
        shared = _shared_expert(load, x, out, Moments(mixture.shared_expert_intermediate_size, widest))
    for expert in range(mixture.num_experts):
        every_inner.add(run(expert, True)[1])
    hidden += out.reshape(hidden.shape)
    if widest == NONE:
        return
    if shared is not None:
        yield dict(zip(_names("mlp.shared_expert."), (every, every, shared), strict=True))
    for expert in range(mixture.num_experts):
        reached, activated = run(expert, False)
        inputs, inner = _with_prior(every), _with_prior(every_inner)
        inputs.add(reached)
        inner.add(activated)
        yield dict(zip(_names(f"mlp.experts.{expert}."), (inputs, inputs, inner), strict=True))


def _shared_expert(load: Load, x: F32, out: F32, inner: Moments) -> Moments:
    """Add the gated output of the shared expert, which every token uses, to `out`. Returns the moments of down_proj."""
    gate, up, down = (load(name) for name in _names("mlp.shared_expert."))
    open_by = load("mlp.shared_expert_gate.weight")
    for start in range(0, len(x), _BATCH):
        part = slice(start, start + _BATCH)
        activated = silu(x[part] @ gate.T) * (x[part] @ up.T)
        inner.add(activated)
        out[part] += sigmoid(x[part] @ open_by)[:, None] * (activated @ down.T)
    return inner


def _names(prefix: str) -> list[str]:
    return [f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")]


_PRIOR = 256
"""Weight, in tokens, of the moments of all tokens of a layer when they are added to those of an expert's tokens."""


def _with_prior(every: Moments) -> Moments:
    moments = Moments(every.bounds[-1][1], every.bounds[0][1])
    factor = np.float32(_PRIOR / max(every.count, 1))
    moments.sums = [total * factor for total in every.sums]
    return moments
