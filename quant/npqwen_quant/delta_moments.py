"""A Gated DeltaNet layer of the unquantized model, in float32: its output, and the moments of its matrices' inputs.

The recurrence (npqwen/kernels/gated_delta.py has it token by token) is computed in chunks, as matrix products (Yang et
al. 2025): within a chunk, what tokens write to the state and read from each other is a triangular system.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from npqwen.format.config import CONVOLUTION, Config
from npqwen_quant.moments import Load, Moments, batches, norm, sigmoid, silu
from npqwen_quant.search import F32

_CHUNK = 64
"""Tokens of a chunk."""
_EPS = np.float32(1e-6)


def recurrent(config: Config, load: Load, hidden: F32, widest: int) -> dict[str, Moments]:
    """Add the output of a Gated DeltaNet layer to the hidden states (sequences, tokens, hidden_size), in place.

    Returns moments by the names of matrices.
    """
    r = config.recurrence
    assert r is not None
    own = "linear_attn."
    qkv, z, b, a = (load(f"{own}in_proj_{part}.weight") for part in ("qkv", "z", "b", "a"))
    taps = load(own + "conv1d.weight").reshape(CONVOLUTION, r.channels)
    decay, bias, factors, output = (load(own + name) for name in ("decay", "dt_bias", "norm.weight", "out_proj.weight"))
    before = load("input_layernorm.weight")
    inputs, outputs = Moments(config.hidden_size, widest), Moments(r.values, widest)
    group = r.linear_num_value_heads // r.linear_num_key_heads

    def heads(x: F32, count: int) -> F32:
        """(sequences, count, tokens, coordinates of a head)."""
        turned: F32 = x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)
        return turned

    for batch in batches(hidden):
        x = norm(batch, before, config)
        inputs.add(x)
        q, k, v = np.split(_convolved(x @ qkv.T, taps), [r.keys, 2 * r.keys], -1)
        # A key head serves a group of consecutive value heads.
        q, k = (np.repeat(_unit(heads(part, r.linear_num_key_heads)), group, 1) for part in (q, k))
        q /= np.float32(math.sqrt(r.linear_key_head_dim))
        beta = sigmoid(x @ b.T).swapaxes(1, 2)
        log_decay = (-decay * np.logaddexp(0, x @ a.T + bias)).swapaxes(1, 2)
        mixed = delta_rule(q, k, heads(v, r.linear_num_value_heads), beta, log_decay)
        mixed = norm(mixed.swapaxes(1, 2), factors, config)  # each head on its own
        mixed = mixed.reshape(*x.shape[:2], r.values) * silu(x @ z.T)
        outputs.add(mixed)
        batch += mixed @ output.T
    inward = {f"{own}in_proj_{part}.weight": inputs for part in ("qkv", "z", "b", "a")}
    return inward | {own + "out_proj.weight": outputs}


def delta_rule(q: F32, k: F32, v: F32, beta: F32, log_decay: F32) -> F32:
    """Outputs (sequences, heads, tokens, value_dim) of the gated delta rule.

    q, k: (sequences, heads, tokens, key_dim). v: (sequences, heads, tokens, value_dim). beta, log_decay: (sequences,
    heads, tokens).
    """
    tokens = v.shape[2]
    state = np.zeros((*v.shape[:2], k.shape[3], v.shape[3]), np.float32)
    out = np.empty_like(v)
    for start in range(0, tokens, _CHUNK):
        part = slice(start, min(start + _CHUNK, tokens))
        size = part.stop - start
        queries, keys = q[:, :, part], k[:, :, part]
        # Sums since the start of the chunk, in float64: small differences of large sums matter.
        total = np.cumsum(log_decay[:, :, part], -1, np.float64)[..., None]
        seen = _exp(np.where(np.tri(size, dtype=np.bool_), total - total.swapaxes(2, 3), -np.inf))
        faded, strength = _exp(total), beta[:, :, part, None]
        # A token writes its value minus what the state, with the writes of the chunk's earlier tokens, has at its key.
        earlier = np.tril(strength * (keys @ keys.swapaxes(2, 3)) * seen, -1)
        written = np.linalg.solve(
            earlier + np.eye(size, dtype=np.float32), strength * (v[:, :, part] - faded * (keys @ state))
        )
        out[:, :, part] = faded * (queries @ state) + (queries @ keys.swapaxes(2, 3) * seen) @ written
        left = _exp(total[:, :, -1:] - total)
        state = faded[:, :, -1:] * state + (left * keys).swapaxes(2, 3) @ written
    return out


def _exp(x: npt.NDArray[np.float64]) -> F32:
    return np.exp(x).astype(np.float32)


def _convolved(x: F32, taps: F32) -> F32:
    """silu of the causal convolution of (sequences, tokens, channels); taps: (CONVOLUTION, channels), oldest first."""
    out = np.zeros_like(x)
    for i, tap in enumerate(taps):
        back = len(taps) - 1 - i
        out[:, back:] += tap * x[:, : x.shape[1] - back]
    return silu(out)


def _unit(x: F32) -> F32:
    """Scaled to length 1 over the last axis."""
    return np.asarray(x / np.sqrt((x * x).sum(-1, keepdims=True) + _EPS), np.float32)
