"""The forward pass of Qwen3 and its hybrids, run step by step by all threads of a team (npqwen/kernels/pieces.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from npqwen.engine.steps import (
    add_shared,
    apply_gates,
    choose_experts,
    embed,
    final_norm,
    multiply_output,
    norm_and_pack,
    pack_all,
    project_gated,
    project_heads,
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
from npqwen.kernels.packing import tile_width
from npqwen.kernels.pieces import claim, leave
from npqwen.simd.scalar import without_refcounts

_inline = njit(nogil=True, inline="always")
"""Compiles a function only as a part of its caller."""


class _Pass(NamedTuple):
    """What the blocks of a pass use, their argument `run`: the records of these names, and the thread's own arrays."""

    team: Any
    model: Any
    tokens: Any
    sequences: Any
    activations: Any
    adapters: Any
    scratch: Any
    local: Any


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
    run = _Pass(team, model, tokens, sequences, activations, adapters, scratch, local)
    if tokens.embed:
        embed(team, model.embed_tokens, tokens.ids, activations.hidden)
    for i in range(layers.size):
        layer = layers[i]
        if recurrent is None:  # noqa: SIM114  Numba compiles only this branch then
            attention_block(run, layer, recurrent)
        elif layer.in_proj.address == 0:
            attention_block(run, layer, recurrent)
        else:
            recurrent_block(run, layer, recurrent)
        if experts is None:  # noqa: SIM114  Numba compiles only this branch then
            dense_feed_forward(run, layer)
        elif layer.expert_bytes == 0:
            dense_feed_forward(run, layer)
        else:
            sparse_feed_forward(run, layer, experts)
    if output.tokens.size:
        if output.normed:
            final_norm(team, model, activations.hidden, output)
        else:
            project_logits(run, output)
    leave(team)


@_inline
def attention_block(run: Any, layer: Any, recurrent: Any) -> None:
    """hidden += o_proj @ attention of the normed hidden; appends the tokens' keys and values to their caches.

    In hybrids, attention's output is multiplied by sigmoid(q_gate @ the normed hidden) (Qiu et al. 2025).
    """
    team, model, tokens, sequences, activations, adapters, scratch, local = run
    packed, queries, attended = activations.packed, activations.queries, activations.attended
    size = model.num_attention_heads * model.head_dim
    width = norm_input(run, layer, layer.input_layernorm, layer.qk_proj, ATTENTION_INPUT)
    project_heads(team, model, layer, tokens, packed, adapters, local, scratch, queries)
    if recurrent is not None:
        project(run, layer, layer.q_gate, packed, width, recurrent.projected, OVERWRITE, Q_GATE)
    attention(
        team, model.attention_kernels, queries, sequences, model.cache_is_int8, layer.kv_index,
        model.num_attention_heads, model.num_key_value_heads, model.head_dim, activations.partials, scratch, attended,
    )  # fmt: skip
    if recurrent is not None:
        apply_gates(team, recurrent.projected, tokens.ids.size, size, attended)
    width = pack_attended(run, layer, size)
    project(run, layer, layer.o_proj, packed, width, activations.hidden, ACCUMULATE, O_PROJ)


@_inline
def recurrent_block(run: Any, layer: Any, recurrent: Any) -> None:
    """hidden += o_proj @ the gated delta rule of the normed hidden (Yang et al. 2024), which advances the states."""
    hidden, packed, attended = run.activations.hidden, run.activations.packed, run.activations.attended
    projected, gates = recurrent
    values = run.model.linear_num_value_heads * run.model.linear_value_head_dim
    ba, qkvz = layer.in_proj_ba, layer.in_proj
    width = norm_input(run, layer, layer.input_layernorm, ba, ATTENTION_INPUT)
    project_pair(run, layer, ba, packed, width, gates, IN_PROJ_B, IN_PROJ_A, ba.rows // 2)
    width = norm_rows(run, layer.input_layernorm, qkvz, hidden[:0])
    project_pair(run, layer, qkvz, packed, width, projected, IN_PROJ_QKV, IN_PROJ_Z, qkvz.rows - values)
    gated_delta(run.team, run.model, layer, run.sequences, projected, gates, run.scratch, attended)
    width = pack_attended(run, layer, values)
    project(run, layer, layer.o_proj, packed, width, hidden, ACCUMULATE, O_PROJ)


@_inline
def dense_feed_forward(run: Any, layer: Any) -> None:
    """hidden += down_proj @ (silu(gate_proj @ x) * (up_proj @ x)), x the normed hidden (Shazeer 2020)."""
    activations = run.activations
    width = norm_input(run, layer, layer.post_attention_layernorm, layer.gate_up_proj, MLP_INPUT)
    compute_gated(run, layer, layer.gate_up_proj, layer.down_proj, width)
    project(run, layer, layer.down_proj, activations.gated, width, activations.hidden, ACCUMULATE, DOWN_PROJ)


@_inline
def sparse_feed_forward(run: Any, layer: Any, experts: Any) -> None:
    """hidden += the weighted sum of the chosen experts' feed-forwards of the normed hidden.

    In hybrids, plus that of a shared expert, which sees every token, times sigmoid(shared_expert_gate @ x), x the
    normed hidden.
    """
    team, model, tokens, _, activations, adapters, scratch, local = run
    hidden, packed = activations.hidden, activations.packed
    normed, scores, chosen, weights, counts, slots, segments, shared_count, gated, results = without_refcounts(experts)
    count, encoding = tokens.ids.size, layer.gate_up_proj.encoding
    kernels, policy = model.matmul_kernels, model.prefetch
    width = norm_rows(run, layer.post_attention_layernorm, layer.router, normed)
    shrink(team, adapters, layer.number, MLP_INPUT, normed, layer.router.cols)
    project(run, layer, layer.router, packed, width, scores, OVERWRITE, ROUTER)
    choose_experts(team, model, scores, counts.size, chosen[:count], weights)
    if layer.shared_expert_gate != 0:
        width = pack_rows(run, normed, model.hidden_size, layer.shared_gate_up_proj)
        compute_gated(run, layer, layer.shared_gate_up_proj, layer.shared_down_proj, width)
        project(run, layer, layer.shared_down_proj, activations.gated, width, results, OVERWRITE, DOWN_PROJ)
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
def project_logits(run: Any, output: Any) -> None:
    """output.values, output.further = lm_head @ final norm of output.tokens; output.maxima = block maxima of values."""
    team, model, _, _, activations, _, scratch, local = run
    hidden, packed = activations.hidden, activations.packed
    rows, matrix = output.tokens.size, model.lm_head
    width = tile_width(rows, matrix.encoding, False)
    norm_and_pack(team, hidden, output.tokens, model.norm, model, matrix.encoding, width, scratch, packed, hidden[:0])
    multiply_output(team, model, packed, output, scratch, local)
    if output.groups.size:
        multiply_groups(
            team, model.matmul_kernels, matrix, output.groups, packed, rows, width, output.further, scratch, local
        )


# The parts that blocks share. `width` is that of the tiles in which activations are packed.


@_inline
def norm_input(run: Any, layer: Any, weight: int, matrix: Any, what: int) -> Any:
    """activations.packed = RMSNorm of hidden, as input of a matrix. Returns the tiles' width.

    weight: the norm's address. what: which input of the layer it is for adapters, ATTENTION_INPUT or MLP_INPUT.
    """
    width = norm_rows(run, weight, matrix, rows_read(run.adapters, layer.number, what))
    shrink(run.team, run.adapters, layer.number, what, run.adapters.normed, matrix.cols)
    return width


@_inline
def norm_rows(run: Any, weight: int, matrix: Any, kept: Any) -> Any:
    """`norm_and_pack` of all tokens' rows of hidden as input of a matrix. Returns the tiles' width."""
    tokens, activations = run.tokens, run.activations
    width = tile_width(tokens.ids.size, matrix.encoding, tokens.prompt)
    norm_and_pack(
        run.team, activations.hidden, tokens.rows, weight, run.model, matrix.encoding, width, run.scratch,
        activations.packed, kept,
    )  # fmt: skip
    return width


@_inline
def pack_rows(run: Any, x: Any, size: int, matrix: Any) -> Any:
    """activations.packed = the first `size` columns of x, a row for each token, as input of a matrix. Returns the
    tiles' width."""
    count = run.tokens.ids.size
    width = tile_width(count, matrix.encoding, run.tokens.prompt)
    pack_all(run.team, x, count, size, matrix, width, run.activations.packed)
    return width


@_inline
def pack_attended(run: Any, layer: Any, size: int) -> Any:
    """activations.packed = the first `size` columns of activations.attended, as input of o_proj. Returns the tiles'
    width."""
    attended = run.activations.attended
    width = pack_rows(run, attended, size, layer.o_proj)
    shrink(run.team, run.adapters, layer.number, ATTENDED, attended, layer.o_proj.cols)
    return width


@_inline
def compute_gated(run: Any, layer: Any, gate_up: Any, down: Any, width: int) -> None:
    """activations.gated = silu(gate_proj @ x) * (up_proj @ x), as input of down_proj, x being activations.packed."""
    adapters, activations = run.adapters, run.activations
    kept = rows_read(adapters, layer.number, GATED)
    project_gated(
        run.team, run.model, gate_up, down, activations.packed, run.tokens.ids.size, width, adapters, layer.number,
        kept, run.local, run.scratch, activations.gated,
    )  # fmt: skip
    shrink(run.team, adapters, layer.number, GATED, adapters.gated, down.cols)


@_inline
def project(run: Any, layer: Any, matrix: Any, x: Any, width: int, out: Any, accumulate: int, role: int) -> None:
    """out = matrix @ x, or += if accumulate; x is packed. role: which matrix of the layer it is for adapters."""
    adapted_matmul(
        run.team, run.model.matmul_kernels, matrix, x, run.tokens.ids.size, width, out, accumulate, run.scratch,
        run.local, run.adapters, layer.number, role,
    )  # fmt: skip


@_inline
def project_pair(
    run: Any, layer: Any, matrix: Any, x: Any, width: int, out: Any, role: int, other: int, split: int
) -> None:
    """`project` of two matrices that are stored as one; the `other` begins at row `split`."""
    adapted_pair(
        run.team, run.model.matmul_kernels, matrix, x, run.tokens.ids.size, width, out, OVERWRITE, run.scratch,
        run.local, run.adapters, layer.number, role, other, split // UNIT_ROWS,
    )  # fmt: skip
