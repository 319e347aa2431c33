"""Records that the compiled forward pass reads: the weights' addresses, and the arrays of one pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.kernels.attention import MAX_ROWS
from npqwen.kernels.matmul import KERNEL_TABLE
from npqwen.kernels.matrix import MATRIX

LAYER = np.dtype(
    [
        ("input_layernorm", np.int64),
        ("qk_proj", MATRIX),
        ("v_proj", MATRIX),
        ("q_norm", np.int64),
        ("k_norm", np.int64),
        ("o_proj", MATRIX),
        ("kv_index", np.int64),
        ("post_attention_layernorm", np.int64),
        ("gate_up_proj", MATRIX),
        ("down_proj", MATRIX),
        ("router", MATRIX),
        ("expert_bytes", np.int64),
        ("number", np.int64),
        ("shared_gate_up_proj", MATRIX),
        ("shared_down_proj", MATRIX),
        ("shared_expert_gate", np.int64),
        ("q_gate", MATRIX),
        ("state_index", np.int64),
        ("in_proj", MATRIX),
        ("in_proj_ba", MATRIX),
        ("conv1d", np.int64),
        ("decay", np.int64),
        ("dt_bias", np.int64),
        ("linear_norm", np.int64),
    ]
)
"""A layer's mapped weights. Vectors are addresses of float32.

kv_index: the layer's index among the attention layers. state_index: its index among the recurrent layers; the fields
after it are those of recurrent layers, which use o_proj, too. q_gate: of a hybrid's attention layers.
expert_bytes: stride from one expert to the next; gate_up_proj and down_proj are the first expert's. 0 in a dense layer.
number: the layer's index in the model.
"""

DRAFT = np.dtype(
    [("pre_fc_norm_embedding", np.int64), ("pre_fc_norm_hidden", np.int64), ("fc", MATRIX), ("norm", np.int64)]
)
"""A draft layer's weights besides its LAYER record: fc computes its input from a token's embedding and the hidden state
of the previous token."""

RECURRENCE = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
"""Fields of MODEL that only hybrids have."""

MODEL = np.dtype(
    [
        ("embed_tokens", MATRIX),
        ("norm", np.int64),
        ("lm_head", MATRIX),
        ("hidden_size", np.int64),
        ("num_attention_heads", np.int64),
        ("num_key_value_heads", np.int64),
        ("head_dim", np.int64),
        ("rms_norm_eps", np.float32),
        ("norm_topk_prob", np.bool_),
        *((key, np.int64) for key in RECURRENCE),
        ("prefetch", np.int64),
        ("matmul_kernels", np.int64, KERNEL_TABLE),
        ("attention_kernels", np.int64, (MAX_ROWS + 1,)),
        ("append_kernels", np.int64, (2,)),
        ("cache_is_int8", np.bool_),
        ("gated_delta_kernel", np.int64),
    ]
)
"""The weights outside the layers, and dimensions under the names of config.json.

prefetch: the policy for experts' pages, see `npqwen.kernels.paging`.
matmul_kernels, attention_kernels, append_kernels, gated_delta_kernel: addresses of machine code, see the functions of
these names; cache_is_int8: whether those of attention and of appending are for an int8 cache.
"""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Tokens(NamedTuple):
    """The tokens of one pass, those of one or more sequences, one sequence after another."""

    ids: Ints
    """(tokens,)"""
    rows: Ints
    """0, 1, ... tokens - 1."""
    embed: bool
    """Whether the pass begins with the embedding; otherwise with `Activations.hidden`, the output of earlier layers."""
    positions: Ints
    """(tokens,), in their own sequences."""
    prompt: bool
    """Whether all of the pass is long parts of prompts, which may be multiplied in bf16 (kernels/prompt_matmul.py)."""
    pages: Ints
    """(tokens,): `SEQUENCE.pages` of their own sequences."""
    cos: Floats
    """(tokens, rotary_dim / 2), of the rotary embedding."""
    sin: Floats


class Activations(NamedTuple):
    """Intermediate results that the threads share. Rows are tokens, padded to whole tiles."""

    hidden: Floats
    """The residual stream."""
    packed: Bytes
    """Input of the next matrix, see `npqwen.kernels.packing`."""
    gated: Bytes
    """Input of down_proj, packed."""
    queries: Floats
    """(tokens, heads * head_dim), normed, rotated and scaled."""
    attended: Floats
    """Output of attention, before o_proj."""
    partials: Floats
    """Partial attention results, where positions are split among threads."""


class ExpertActivations(NamedTuple):
    """Intermediate results of sparse layers that the threads share. A slot holds one token for one expert."""

    normed: Floats
    """(tokens, hidden)"""
    scores: Floats
    """(tokens, experts), of the router."""
    chosen: Ints
    """(tokens, experts per token): the experts' numbers."""
    weights: Floats
    """(tokens, experts per token)"""
    counts: Ints
    """(experts,): scratch of `arrange`."""
    slots: Ints
    """(tokens, experts per token)"""
    segments: Ints
    """(segments, 4), see `npqwen.kernels.experts`."""
    segment_count: Ints
    """(1,)"""
    gated: Bytes
    """Input of down_proj, packed, by slot."""
    results: Floats
    """(slots, hidden)"""


class Adapted(NamedTuple):
    """The model's LoRA adapters, and which tokens of the pass have one (npqwen/kernels/low_rank.py)."""

    kernels: Ints
    """See `low_rank_kernels`."""
    shrinks: Ints
    """(adapters, layers, inputs, 2): address of the stacked A of all matrices that read an input, and its number of
    groups of 16 ranks."""
    expands: Ints
    """(adapters, layers, matrices, 3): address of B, rank, and the index of its first rank in the stacked A."""
    most_groups: Ints
    """(layers, inputs): the most groups of any adapter."""
    expert_shrinks: Ints
    """(adapters, layers, experts, inputs of an expert, 2), with 0 experts if none is adapted."""
    expert_expands: Ints
    """(adapters, layers, experts, matrices of an expert, 3)"""
    expert_most_groups: Ints
    """(layers, inputs of an expert)"""
    tiles: Ints
    """(tiles, 3): number of the adapter, first token, number of tokens. Tiles of one adapter are adjacent; tokens
    without an adapter are in none."""
    token_adapters: Ints
    """(tokens,): number of the adapter, or -1; empty if no token has one."""
    normed: Floats
    """(tokens, hidden), the input of attention or feed-forward."""
    gated: Floats
    """(tokens, inner), the input of down_proj."""
    reduced: Floats
    """(tokens, PARTS, ranks): A @ x, as a sum of parts."""
    slot_adapters: Ints
    """(slots,): number of the adapter, or -1."""
    slot_gated: Floats
    """(slots, inner)"""
    slot_reduced: Floats
    """(slots, 1, ranks)"""


class RecurrentActivations(NamedTuple):
    """Intermediate results of a hybrid's layers that the threads share. Rows are tokens."""

    projected: Floats
    """Of in_proj: queries, keys, values and z, see `npqwen.kernels.gated_delta`; in attention layers, of q_gate."""
    gates: Floats
    """Of in_proj_ba."""


class Workspace(NamedTuple):
    """Private arrays of the threads, one row per thread."""

    scratch: Floats
    local: Floats
    """A matrix's results that the same thread processes further."""


class Output(NamedTuple):
    """The results of the pass, which also extends the caches."""

    tokens: Ints
    """Indices of the tokens that have results; if empty, the final norm and the output matrix are skipped."""
    normed: bool
    """Whether the results are the final norm's; otherwise they are logits."""
    values: Floats
    """A row for each of `tokens`: (>= rows, hidden_size) if normed, else (whole tiles of rows, padded vocabulary), or
    fewer columns, for the lowest ids only."""
    groups: Ints = np.zeros(0, np.int64)
    """Row groups of the output matrix, 16 ids each, whose logits are computed besides those in `values`."""
    further: Floats = np.zeros((1, 0), np.float32)
    """These logits: (rows, 16 * groups)."""
    maxima: Floats = np.zeros((0, 0), np.float32)
    """Block maxima of `values`, see `npqwen.kernels.greatest.block_maxima`: (>= rows, blocks); empty if not needed."""
