"""The forward pass of Qwen3 and its hybrids, run step by step by all threads of a team (npqwen/kernels/pieces.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.engine.steps import (
    add_shared,
    apply_gates,
    embed,
    final_norm,
    multiply_output,
    norm_and_pack,
    pack_all,
    project_gated,
    project_heads,
    step,
)
from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels.attention import attention
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
    GATED,
    IN_PROJ_A,
    IN_PROJ_B,
    IN_PROJ_QKV,
    IN_PROJ_Z,
    MLP_INPUT,
    O_PROJ,
    Q_GATE,
    ROUTER,
    SHARED_GATE_INPUT,
    adapted_matmul,
    adapted_pair,
    rows_read,
    shrink,
)
from npqwen.kernels.low_rank_experts import EXPERT_GATED, EXPERT_INPUT, gated_rows_read, shrink_slots
from npqwen.kernels.matmul import ACCUMULATE, OVERWRITE, multiply_groups
from npqwen.kernels.norm import rms_norm
from npqwen.kernels.packing import pack, tile_width, whole_tiles
from npqwen.kernels.pieces import claim, leave
from npqwen.simd.scalar import memory, without_refcounts

_inline = njit(nogil=True, inline="always")
"""Compiles a function only as a part of its caller."""


@njit(nogil=True)
def forward(
    team: Any, member: int, model: Any, layers: Any, tokens: Any, sequences: Any, activations: Any, experts: Any,
    recurrent: Any, adapters: Any, workspace: Any, output: Any,
) -> None:  # fmt: skip
    """One pass: embedding, layers, final norm, output matrix. Every thread of the team calls it with its own `member`.

    team: this member's row of the team's state. model, layers: MODEL record and array of LAYER records. The others are
    the records of the same names in npqwen.engine.records; experts: ExpertActivations, or None if no layer is sparse;
    recurrent: RecurrentActivations, or None if all layers are plain attention; adapters: Adapted.
    """
    team, layers = without_refcounts((team, layers))
    tokens, sequences = without_refcounts((tokens, sequences))
    activations, adapters = without_refcounts((activations, adapters))
    output, workspace = without_refcounts((output, workspace))
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
            recurrent_block(team, model, layer, tokens, sequences, activations, recurrent, adapters, scratch, local)
        if experts is None:  # noqa: SIM114  Numba compiles only this branch then
            dense_feed_forward(team, model, layer, tokens, activations, adapters, scratch, local)
        elif layer.expert_bytes == 0:
            dense_feed_forward(team, model, layer, tokens, activations, adapters, scratch, local)
        else:
            sparse_feed_forward(team, model, layer, tokens, activations, experts, adapters, scratch, local)
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
    kept, width = rows_read(adapters, layer.number, ATTENTION_INPUT), tile_width(count, encoding, tokens.prompt)
    norm_and_pack(team, hidden, tokens.rows, weight, model, encoding, width, scratch, packed, kept)
    shrink(team, adapters, layer.number, ATTENTION_INPUT, adapters.normed, layer.qk_proj.cols)
    project_heads(team, model, layer, tokens, packed, adapters, local, scratch, queries)
    size = model.num_attention_heads * model.head_dim
    if recurrent is not None:
        adapted_matmul(
            team, model.matmul_kernels, layer.q_gate, packed, count, width, recurrent.projected, OVERWRITE, scratch,
            local, adapters, layer.number, Q_GATE,
        )  # fmt: skip
    attention(
        team, model.attention_kernels, queries, sequences, model.cache_is_int8, layer.kv_index,
        model.num_attention_heads, model.num_key_value_heads, model.head_dim, partials, scratch, attended,
    )  # fmt: skip
    if recurrent is not None:
        apply_gates(team, recurrent.projected, count, size, attended)
    width = tile_width(count, layer.o_proj.encoding, tokens.prompt)
    pack_all(team, attended, count, size, layer.o_proj, width, packed)
    shrink(team, adapters, layer.number, ATTENDED, attended, layer.o_proj.cols)
    adapted_matmul(
        team, model.matmul_kernels, layer.o_proj, packed, count, width, hidden, ACCUMULATE, scratch, local, adapters,
        layer.number, O_PROJ,
    )  # fmt: skip


@_inline
def recurrent_block(
    team: Any, model: Any, layer: Any, tokens: Any, sequences: Any, activations: Any, recurrent: Any, adapters: Any,
    scratch: Any, local: Any,
) -> None:  # fmt: skip
    """hidden += o_proj @ the gated delta rule of the normed hidden (Yang et al. 2024), which advances the states."""
    hidden, packed, _, _, attended, _ = activations
    projected, gates = recurrent
    count, kernels, weight = tokens.ids.size, model.matmul_kernels, layer.input_layernorm
    values = model.linear_num_value_heads * model.linear_value_head_dim
    matrix, kept = layer.in_proj_ba, rows_read(adapters, layer.number, ATTENTION_INPUT)
    width = tile_width(count, matrix.encoding, tokens.prompt)
    norm_and_pack(team, hidden, tokens.rows, weight, model, matrix.encoding, width, scratch, packed, kept)
    shrink(team, adapters, layer.number, ATTENTION_INPUT, adapters.normed, matrix.cols)
    adapted_pair(
        team, kernels, matrix, packed, count, width, gates, OVERWRITE, scratch, local, adapters, layer.number,
        IN_PROJ_B, IN_PROJ_A, matrix.rows // UNIT_ROWS // 2,
    )  # fmt: skip
    matrix = layer.in_proj
    width = tile_width(count, matrix.encoding, tokens.prompt)
    norm_and_pack(team, hidden, tokens.rows, weight, model, matrix.encoding, width, scratch, packed, hidden[:0])
    adapted_pair(
        team, kernels, matrix, packed, count, width, projected, OVERWRITE, scratch, local, adapters, layer.number,
        IN_PROJ_QKV, IN_PROJ_Z, (matrix.rows - values) // UNIT_ROWS,
    )  # fmt: skip
    gated_delta(team, model, layer, sequences, projected, gates, scratch, attended)
    width = tile_width(count, layer.o_proj.encoding, tokens.prompt)
    pack_all(team, attended, count, values, layer.o_proj, width, packed)
    shrink(team, adapters, layer.number, ATTENDED, attended, layer.o_proj.cols)
    adapted_matmul(
        team, kernels, layer.o_proj, packed, count, width, hidden, ACCUMULATE, scratch, local, adapters, layer.number,
        O_PROJ,
    )  # fmt: skip


@_inline
def dense_feed_forward(
    team: Any, model: Any, layer: Any, tokens: Any, activations: Any, adapters: Any, scratch: Any, local: Any
) -> None:
    """hidden += down_proj @ (silu(gate_proj @ x) * (up_proj @ x)), x the normed hidden (Shazeer 2020)."""
    hidden, packed, gated, _, _, _ = activations
    count = tokens.ids.size
    weight, encoding = layer.post_attention_layernorm, layer.gate_up_proj.encoding
    width = tile_width(count, encoding, tokens.prompt)
    kept = rows_read(adapters, layer.number, MLP_INPUT)
    norm_and_pack(team, hidden, tokens.rows, weight, model, encoding, width, scratch, packed, kept)
    shrink(team, adapters, layer.number, MLP_INPUT, adapters.normed, layer.gate_up_proj.cols)
    kept = rows_read(adapters, layer.number, GATED)
    project_gated(
        team, model, layer.gate_up_proj, layer.down_proj, packed, count, width, adapters, layer.number, kept, local,
        scratch, gated,
    )  # fmt: skip
    shrink(team, adapters, layer.number, GATED, adapters.gated, layer.down_proj.cols)
    adapted_matmul(
        team, model.matmul_kernels, layer.down_proj, gated, count, width, hidden, ACCUMULATE, scratch, local, adapters,
        layer.number, DOWN_PROJ,
    )  # fmt: skip


@step
def sparse_feed_forward(
    team: Any, model: Any, layer: Any, tokens: Any, activations: Any, experts: Any, adapters: Any, scratch: Any,
    local: Any,
) -> None:  # fmt: skip
    """hidden += the weighted sum of the chosen experts' feed-forwards of the normed hidden.

    In hybrids, plus that of a shared expert, which sees every token, times sigmoid(shared_expert_gate @ x), x the
    normed hidden.
    """
    hidden, packed = activations.hidden, activations.packed
    normed, scores, chosen, weights, counts, slots, segments, shared_count, gated, results = without_refcounts(experts)
    norm = memory(layer.post_attention_layernorm, model.hidden_size, np.float32)
    count, encoding = tokens.ids.size, layer.gate_up_proj.encoding
    width = tile_width(count, layer.router.encoding, tokens.prompt)
    kernels, policy = model.matmul_kernels, model.prefetch
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            break
        if t < count:
            rms_norm(hidden[t], norm, model.rms_norm_eps, normed[t])
        pack(normed[t], t, width, layer.router.encoding, packed)
    shrink(team, adapters, layer.number, MLP_INPUT, normed, layer.router.cols)
    adapted_matmul(
        team, kernels, layer.router, packed, count, width, scores, OVERWRITE, scratch, local, adapters, layer.number,
        ROUTER,
    )  # fmt: skip
    while True:
        t = claim(team, count)
        if t == count:
            break
        route(scores[t, : counts.size], model.norm_topk_prob, chosen[t], weights[t])
    if layer.shared_expert_gate != 0:
        gate_up, down = layer.shared_gate_up_proj, layer.shared_down_proj
        width = tile_width(count, gate_up.encoding, tokens.prompt)
        pack_all(team, normed, count, model.hidden_size, gate_up, width, packed)
        kept = rows_read(adapters, layer.number, GATED)
        project_gated(
            team, model, gate_up, down, packed, count, width, adapters, layer.number, kept, local, scratch,
            activations.gated,
        )  # fmt: skip
        shrink(team, adapters, layer.number, GATED, adapters.gated, down.cols)
        adapted_matmul(
            team, kernels, down, activations.gated, count, width, results, OVERWRITE, scratch, local, adapters,
            layer.number, DOWN_PROJ,
        )  # fmt: skip
        shrink(team, adapters, layer.number, SHARED_GATE_INPUT, normed, layer.router.cols)
        add_shared(team, model, layer, adapters, normed, results, count, hidden)
    while claim(team, 1) == 0:
        shared_count[0] = arrange(chosen[:count], encoding, tokens.prompt, counts, slots, segments)
    segment_count = shared_count[0]
    # Always a step, so that all passes have the same steps: a late thread may see the policy of a later pass.
    prefetch_first_matrices(team, policy, layer, segments, segment_count, scratch)
    pack_choices(team, normed, slots[:count], segments, segment_count, encoding, packed)
    shrink_slots(team, adapters, layer.number, EXPERT_INPUT, chosen[:count], slots[:count], normed)
    kept = gated_rows_read(adapters, layer.number)
    project_gated_slots(
        team, kernels, layer, policy, segments, segment_count, count, packed, adapters, kept, local, scratch, gated
    )
    shrink_slots(team, adapters, layer.number, EXPERT_GATED, chosen[:count], slots[:count], adapters.slot_gated)
    multiply_slots(
        team, kernels, layer, policy, segments, segment_count, count, gated, adapters, results, scratch, local
    )
    combine(team, results, slots[:count], weights, hidden)


@_inline
def project_logits(team: Any, model: Any, activations: Any, output: Any, scratch: Any, local: Any) -> None:
    """output.values, output.further = lm_head @ final norm of output.tokens; output.maxima = block maxima of values."""
    hidden, packed = activations.hidden, activations.packed
    rows, matrix = output.tokens.size, model.lm_head
    width = tile_width(rows, matrix.encoding, False)
    norm_and_pack(team, hidden, output.tokens, model.norm, model, matrix.encoding, width, scratch, packed, hidden[:0])
    multiply_output(team, model, packed, output, scratch, local)
    if output.groups.size:
        multiply_groups(
            team, model.matmul_kernels, matrix, output.groups, packed, rows, width, output.further, scratch, local
        )
