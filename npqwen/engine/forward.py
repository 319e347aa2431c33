"""The forward pass of Qwen3 and its hybrids, run step by step by all threads of a team (npqwen/kernels/pieces.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels.append import append_key, append_value
from npqwen.kernels.attention import attention
from npqwen.kernels.cache_page import PAGE
from npqwen.kernels.experts import (
    arrange,
    combine,
    multiply_slots,
    pack_choices,
    prefetch_first_matrices,
    project_gated_slots,
    route,
)
from npqwen.kernels.gated_delta import gated_delta
from npqwen.kernels.low_rank import (
    ATTENDED,
    ATTENTION_INPUT,
    DOWN_PROJ,
    GATE_PROJ,
    GATED,
    K_PROJ,
    MLP_INPUT,
    O_PROJ,
    Q_PROJ,
    ROUTER,
    UP_PROJ,
    V_PROJ,
    adapted_matmul,
    add_low_rank,
    rows_read,
    shrink,
)
from npqwen.kernels.low_rank_experts import EXPERT_GATED, EXPERT_INPUT, shrink_slots
from npqwen.kernels.matmul import local_chunk, matmul, multiply_local_rows
from npqwen.kernels.matrix import GROUPS_PER_BLOCK, read_row
from npqwen.kernels.norm import add_gated, multiply_sigmoid, rms_norm, rotate
from npqwen.kernels.packing import copy_floats, pack, pack_gated, tile_width, whole_tiles
from npqwen.kernels.pieces import claim, claim_private, finish_first, leave
from npqwen.simd.scalar import memory, without_refcounts

_step = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles a function that only compiled code calls, without the wrappers for other callers."""
_inline = njit(nogil=True, inline="always")
"""Compiles a function only as a part of its caller."""


@njit(nogil=True)
def forward(
    team: Any, member: int, model: Any, layers: Any, tokens: Any, sequences: Any, activations: Any, experts: Any,
    recurrent: Any, adapters: Any, workspace: Any, output: Any,
) -> None:  # fmt: skip
    """One pass: embedding, layers, final norm, output matrix. Every thread of the team calls it with its own `member`.

    team: this member's row of the team's state. model, layers: MODEL record and array of LAYER records. The others are
    the records of npqwen.engine.records of these names; experts: ExpertActivations, or None if no layer is sparse;
    recurrent: RecurrentActivations, or None if all layers are plain attention.
    """
    team, layers = without_refcounts((team, layers))
    tokens, sequences = without_refcounts((tokens, sequences))
    activations, output, workspace = without_refcounts((activations, output, workspace))
    adapters = without_refcounts(adapters)
    scratch, local = workspace.scratch[member], workspace.local[member]
    if tokens.embed:
        embed(team, model.embed_tokens, tokens.ids, activations.hidden)
    for i in range(layers.size):
        layer = layers[i]
        if recurrent is None:  # noqa: SIM114  Numba compiles only this branch then
            attention_block(team, model, layer, tokens, sequences, activations, recurrent, adapters, scratch, local)
        elif layer.in_proj.address == 0:
            attention_block(team, model, layer, tokens, sequences, activations, recurrent, adapters, scratch, local)
        else:
            recurrent_block(team, model, layer, tokens, sequences, activations, recurrent, scratch, local)
        if experts is None:  # noqa: SIM114  Numba compiles only this branch then
            dense_feed_forward(team, model, layer, tokens.rows, activations, adapters, scratch, local)
        elif layer.expert_bytes == 0:
            dense_feed_forward(team, model, layer, tokens.rows, activations, adapters, scratch, local)
        else:
            sparse_feed_forward(team, model, layer, tokens.ids.size, activations, experts, adapters, scratch, local)
    if output.tokens.size:
        if output.normed:
            final_norm(team, model, activations.hidden, output)
        else:
            project_logits(team, model, activations, output, scratch, local)
    leave(team)


@_inline
def attention_block(
    team: Any, model: Any, layer: Any, tokens: Any, sequences: Any, activations: Any, recurrent: Any, adapters: Any,
    scratch: Any, local: Any,
) -> None:  # fmt: skip
    """hidden += o_proj @ attention of the normed hidden; appends the tokens' keys and values to their caches.

    In hybrids, attention's output is multiplied by sigmoid(q_gate @ the normed hidden) (Qiu et al. 2025).
    """
    hidden, packed, _, queries, attended, partials = activations
    count = tokens.ids.size
    weight, encoding = layer.input_layernorm, layer.qk_proj.encoding
    kept = rows_read(adapters, layer.number, ATTENTION_INPUT, adapters.normed)
    norm_and_pack(team, hidden, tokens.rows, weight, model, encoding, scratch, packed, kept)
    shrink(team, adapters, layer.number, ATTENTION_INPUT, adapters.normed)
    project_heads(team, model, layer, tokens, sequences.dtype, packed, adapters, local, scratch, queries)
    size = model.num_attention_heads * model.head_dim
    if recurrent is not None:
        gates, width = recurrent.projected, tile_width(count, encoding)  # that of `norm_and_pack`
        matmul(team, model.matmul_kernels, layer.q_gate, packed, count, width, gates, 0, scratch, local)
    attention(
        team, model.attention_kernels, queries, sequences.records, sequences.dtype, layer.kv_index,
        model.num_attention_heads, model.num_key_value_heads, model.head_dim, partials, scratch, attended,
    )  # fmt: skip
    if recurrent is not None:
        apply_gates(team, recurrent.projected, count, size, attended)
    pack_all(team, attended, count, size, layer.o_proj, packed)
    shrink(team, adapters, layer.number, ATTENDED, attended)
    width = tile_width(count, layer.o_proj.encoding)
    adapted_matmul(
        team, model.matmul_kernels, layer.o_proj, packed, count, width, hidden, 1, scratch, local, adapters,
        layer.number, O_PROJ,
    )  # fmt: skip


@_inline
def recurrent_block(
    team: Any, model: Any, layer: Any, tokens: Any, sequences: Any, activations: Any, recurrent: Any, scratch: Any,
    local: Any,
) -> None:  # fmt: skip
    """hidden += o_proj @ the gated delta rule of the normed hidden (Yang et al. 2025), which advances the states."""
    hidden, packed, _, _, attended, _ = activations
    projected, gates = recurrent
    count, kernels, weight = tokens.ids.size, model.matmul_kernels, layer.input_layernorm
    for matrix, out in ((layer.in_proj_ba, gates), (layer.in_proj, projected)):
        norm_and_pack(team, hidden, tokens.rows, weight, model, matrix.encoding, scratch, packed, hidden[:0])
        matmul(team, kernels, matrix, packed, count, tile_width(count, matrix.encoding), out, 0, scratch, local)
    gated_delta(team, model, layer, sequences.records, projected, gates, scratch, attended)
    pack_all(team, attended, count, model.linear_num_value_heads * model.linear_value_head_dim, layer.o_proj, packed)
    width = tile_width(count, layer.o_proj.encoding)
    matmul(team, kernels, layer.o_proj, packed, count, width, hidden, 1, scratch, local)


@_inline
def dense_feed_forward(
    team: Any, model: Any, layer: Any, rows: Any, activations: Any, adapters: Any, scratch: Any, local: Any
) -> None:
    """hidden += down_proj @ (silu(gate_proj @ x) * (up_proj @ x)), x the normed hidden (Shazeer 2020)."""
    hidden, packed, gated, _, _, _ = activations
    count = rows.size
    weight, encoding = layer.post_attention_layernorm, layer.gate_up_proj.encoding
    kept = rows_read(adapters, layer.number, MLP_INPUT, adapters.normed)
    norm_and_pack(team, hidden, rows, weight, model, encoding, scratch, packed, kept)
    shrink(team, adapters, layer.number, MLP_INPUT, adapters.normed)
    project_gated(
        team, model, layer.gate_up_proj, layer.down_proj, packed, count, adapters, layer.number, local, scratch, gated
    )
    shrink(team, adapters, layer.number, GATED, adapters.gated)
    width = tile_width(count, encoding)  # that of `project_gated`, which has packed
    adapted_matmul(
        team, model.matmul_kernels, layer.down_proj, gated, count, width, hidden, 1, scratch, local, adapters,
        layer.number, DOWN_PROJ,
    )  # fmt: skip


@_step
def sparse_feed_forward(
    team: Any, model: Any, layer: Any, count: int, activations: Any, experts: Any, adapters: Any, scratch: Any,
    local: Any,
) -> None:  # fmt: skip
    """hidden += the weighted sum of the chosen experts' feed-forwards of the normed hidden.

    In hybrids, that of an expert which sees every token, times sigmoid(shared_expert_gate @ the normed hidden), too.
    """
    hidden, packed = activations.hidden, activations.packed
    normed, scores, chosen, weights, counts, slots, segments, shared_count, gated, results = without_refcounts(experts)
    norm = memory(layer.post_attention_layernorm, model.hidden_size, np.float32)
    width = tile_width(count, layer.router.encoding)
    encoding = layer.gate_up_proj.encoding
    kernels, policy = model.matmul_kernels, model.prefetch
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            break
        if t < count:
            rms_norm(hidden[t], norm, model.rms_norm_eps, normed[t])
        pack(normed[t], t, width, layer.router.encoding, packed)
    shrink(team, adapters, layer.number, MLP_INPUT, normed)
    adapted_matmul(
        team, kernels, layer.router, packed, count, width, scores, 0, scratch, local, adapters, layer.number, ROUTER
    )
    while True:
        t = claim(team, count)
        if t == count:
            break
        route(scores[t, : counts.size], model.norm_topk_prob, chosen[t], weights[t])
    if layer.shared_expert_gate != 0:
        gate_up, down = layer.shared_gate_up_proj, layer.shared_down_proj
        pack_all(team, normed, count, model.hidden_size, gate_up, packed)
        # Hybrids, which alone have a shared expert, have no adapters.
        project_gated(
            team, model, gate_up, down, packed, count, adapters, layer.number, local, scratch, activations.gated
        )
        width = tile_width(count, gate_up.encoding)  # that of `project_gated`, which has packed
        matmul(team, kernels, down, activations.gated, count, width, results, 0, scratch, local)
        add_shared(team, model, layer.shared_expert_gate, normed, results, count, hidden)
    while claim(team, 1) == 0:
        shared_count[0] = arrange(chosen[:count], encoding, counts, slots, segments)
    segment_count = shared_count[0]
    # Always a step, so that every pass has the same: a late thread may see the policy of a later one.
    prefetch_first_matrices(team, policy, layer, segments, segment_count, scratch)
    pack_choices(team, normed, slots[:count], segments, segment_count, encoding, packed)
    shrink_slots(team, adapters, layer.number, EXPERT_INPUT, chosen[:count], slots[:count], normed)
    project_gated_slots(
        team, kernels, layer, policy, segments, segment_count, count, packed, adapters, local, scratch, gated
    )
    shrink_slots(team, adapters, layer.number, EXPERT_GATED, chosen[:count], slots[:count], adapters.slot_gated)
    multiply_slots(
        team, kernels, layer, policy, segments, segment_count, count, gated, adapters, results, scratch, local
    )
    combine(team, results, slots[:count], weights, hidden)


@_step
def final_norm(team: Any, model: Any, hidden: Any, output: Any) -> None:
    """output.values = the final norm of output.tokens."""
    weight = memory(model.norm, model.hidden_size, np.float32)
    while True:
        t = claim(team, output.tokens.size)
        if t == output.tokens.size:
            return
        rms_norm(hidden[output.tokens[t]], weight, model.rms_norm_eps, output.values[t])


@_inline
def project_logits(team: Any, model: Any, activations: Any, output: Any, scratch: Any, local: Any) -> None:
    """output.values = lm_head @ the final norm of output.tokens."""
    hidden, packed = activations.hidden, activations.packed
    rows, matrix = output.tokens.size, model.lm_head
    norm_and_pack(team, hidden, output.tokens, model.norm, model, matrix.encoding, scratch, packed, hidden[:0])
    width = tile_width(rows, matrix.encoding)
    matmul(team, model.matmul_kernels, matrix, packed, rows, width, output.values, 0, scratch, local)


@_step
def embed(team: Any, embed_tokens: Any, ids: Any, hidden: Any) -> None:
    """hidden[t] = the embedding of ids[t]."""
    while True:
        t = claim(team, ids.size)
        if t == ids.size:
            return
        read_row(embed_tokens, ids[t], hidden[t])


@_step
def norm_and_pack(
    team: Any, hidden: Any, rows: Any, weight: int, model: Any, encoding: int, scratch: Any, packed: Any, kept: Any
) -> None:
    """packed = RMSNorm of hidden[rows], padded to whole tiles, as input of a matrix of an encoding.

    rows: int64. weight: address of the norm's float32 (hidden_size,). model: the MODEL record. encoding: a code.
    scratch: this thread's float32, at least a row of hidden. packed: uint8, see npqwen/kernels/packing.py. kept:
    float32 (tokens, columns of hidden) for what is packed, or none of its rows.
    """
    count = rows.size
    width = tile_width(count, encoding)
    cols = hidden.shape[1]
    normed = scratch[:cols]
    weights = memory(weight, model.hidden_size, np.float32)
    normed[model.hidden_size :] = np.float32(0.0)
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            return
        if t < count:
            rms_norm(hidden[rows[t]], weights, model.rms_norm_eps, normed)
            if kept.shape[0]:
                copy_floats(normed, kept[t])
        else:
            normed[:] = np.float32(0.0)
        pack(normed, t, width, encoding, packed)


@_step
def pack_all(team: Any, x: Any, count: int, size: int, matrix: Any, packed: Any) -> None:
    """packed = `size` elements of each of the first `count` rows of x, padded to whole tiles, as input of a matrix."""
    width = tile_width(count, matrix.encoding)
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            return
        line = x[t, : matrix.cols]
        line[size:] = np.float32(0.0)
        pack(line, t, width, matrix.encoding, packed)


@_step
def apply_gates(team: Any, gates: Any, count: int, size: int, x: Any) -> None:
    """x *= sigmoid(gates), of the first `size` elements of the first `count` rows."""
    while True:
        t = claim(team, count)
        if t == count:
            return
        multiply_sigmoid(gates[t, :size], x[t])


@_step
def add_shared(team: Any, model: Any, gate: int, normed: Any, shared: Any, count: int, hidden: Any) -> None:
    """hidden += sigmoid(gate @ normed) * shared, of the first `count` rows. gate: address of float32 (hidden_size,)."""
    weight = memory(gate, model.hidden_size, np.float32)
    while True:
        t = claim(team, count)
        if t == count:
            return
        add_gated(weight, normed[t], shared[t], hidden[t])


@_step
def project_gated(
    team: Any, model: Any, matrix: Any, down_proj: Any, packed: Any, count: int, adapters: Any, number: int, local: Any,
    scratch: Any, gated: Any,
) -> None:  # fmt: skip
    """gated = silu(gate_proj @ x) * (up_proj @ x), packed for down_proj; x is `packed`. matrix: gate_up_proj.

    Each thread does this to the rows that it has computed, while they are in its own cache: in `local`.
    """
    width = tile_width(count, matrix.encoding)
    groups = matrix.rows // UNIT_ROWS
    chunk = local_chunk(team, matrix, groups, count, width, local, GROUPS_PER_BLOCK)
    pieces = (groups + chunk - 1) // chunk
    kept = rows_read(adapters, number, GATED, adapters.gated)
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        first, last = chunk * piece, min(chunk * (piece + 1), groups)
        multiply_local_rows(model.matmul_kernels, matrix, packed, count, width, first, last, scratch, local)
        add_low_rank(team, adapters, number, GATE_PROJ, local, first, last, 0, 2, groups // 2, scratch)
        add_low_rank(team, adapters, number, UP_PROJ, local, first, last, 1, 2, groups // 2, scratch)
        if not finish_first(team):
            continue
        padded = whole_tiles(count, width)
        pack_gated(local, matrix, first, last, 0, padded, width, down_proj, scratch, gated, kept)


@_step
def project_heads(
    team: Any, model: Any, layer: Any, tokens: Any, cache_dtype: Any, packed: Any, adapters: Any, local: Any,
    scratch: Any, queries: Any,
) -> None:  # fmt: skip
    """The heads of qk_proj @ x and v_proj @ x, x being `packed`. Keys and values go into their sequences' caches.

    Queries and keys are normed and rotated, queries scaled by 1 / sqrt(head_dim): queries (tokens, heads * head_dim).
    Each thread does this to the heads that it has computed, while they are in its own cache: in `local`.
    """
    count, dim = tokens.ids.size, model.head_dim
    width = tile_width(count, layer.qk_proj.encoding)
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    first_key = 2 * layer.kv_index * kv_heads  # the page's heads: for each layer the keys', then the values'
    q_norm, k_norm = memory(layer.q_norm, dim, np.float32), memory(layer.k_norm, dim, np.float32)
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    # Pieces of both matrices are one pool of work: row groups of qk_proj, then those of v_proj.
    qk_groups, v_groups = layer.qk_proj.rows // UNIT_ROWS, layer.v_proj.rows // UNIT_ROWS
    chunk = local_chunk(team, layer.qk_proj, qk_groups + v_groups, count, width, local, dim // UNIT_ROWS)
    qk_pieces = (qk_groups + chunk - 1) // chunk
    pieces = qk_pieces + (v_groups + chunk - 1) // chunk
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        in_qk = piece < qk_pieces
        matrix = layer.qk_proj if in_qk else layer.v_proj
        first = chunk * (piece if in_qk else piece - qk_pieces)
        last = min(first + chunk, qk_groups if in_qk else v_groups)
        multiply_local_rows(model.matmul_kernels, matrix, packed, count, width, first, last, scratch, local)
        if in_qk:
            q_groups = heads * dim // UNIT_ROWS
            add_low_rank(team, adapters, layer.number, Q_PROJ, local, first, last, 0, 1, q_groups, scratch)
            k_groups = qk_groups - q_groups
            add_low_rank(team, adapters, layer.number, K_PROJ, local, first, last, q_groups, 1, k_groups, scratch)
        else:
            add_low_rank(team, adapters, layer.number, V_PROJ, local, first, last, 0, 1, v_groups, scratch)
        if not finish_first(team):
            continue
        rows = UNIT_ROWS * (last - first)
        first_head = UNIT_ROWS * (first if in_qk else qk_groups + first) // dim
        for head in range(first_head, first_head + rows // dim):
            for t in range(count):
                at = t * rows + (head - first_head) * dim
                x = local[at : at + dim]
                position = tokens.positions[t]
                pages = memory(tokens.pages[t], position // PAGE + 1, np.int64)
                if head < heads:
                    query = queries[t, head * dim : (head + 1) * dim]
                    rms_norm(x, q_norm, model.rms_norm_eps, query)
                    rotate(query, tokens.cos[t], tokens.sin[t])
                    for k in range(dim):
                        query[k] *= scale
                elif head < heads + kv_heads:
                    rms_norm(x, k_norm, model.rms_norm_eps, x)
                    rotate(x, tokens.cos[t], tokens.sin[t])
                    append_key(pages, cache_dtype, first_key + head - heads, position, x)
                else:
                    append_value(pages, cache_dtype, first_key + head - heads, position, x)
