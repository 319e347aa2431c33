"""A converted model's shapes, the size of its parts, and the memory it needs on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npqwen.engine.adapters import Adapters, check_adapters
from npqwen.engine.budget import Budget
from npqwen.engine.buffers import Buffers
from npqwen.engine.cache_type import CacheType, check_cache_type
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.engine import chunk_size
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.recurrent_states import RecurrentShape, states_bytes
from npqwen.engine.weights import Weights
from npqwen.format.config import Config
from npqwen.format.encodings import ENCODINGS
from npqwen.format.layout import Experts, Layout, Tensor, Vector
from npqwen.format.quantization import EvaluationRecord
from npqwen.hardware import machine
from npqwen.simd.isa import ISA, available
from npqwen.wording import size

PARTS = {
    "embedding": ("embed_tokens",),
    "attention": ("qk_proj", "v_proj", "q_gate", "o_proj"),
    "recurrence": ("in_proj", "in_proj_ba", "conv1d", ".linear_attn", "out_proj"),
    "feed-forward": (".mlp.gate_up_proj", ".mlp.down_proj"),
    "experts": (".experts",),
    "shared expert": ("shared_expert.gate_up_proj", "shared_expert.down_proj", "shared_expert_gate"),
    "routers": (".mlp.gate",),
    "norms": ("norm",),
    "output": ("lm_head",),
    "draft layer": (),
}
"""Name suffixes of each part's tensors, without the last component."""


@dataclass(frozen=True)
class Info:
    """A model and this machine. Sizes are in bytes."""

    path: str
    config: Config
    bits: int
    """The recipe's nominal bits per weight."""
    encodings: list[str]
    """Of the matrices."""
    parameters: int
    bits_per_weight: float
    """Stored bits of the matrices, scales and padding included, per weight of the checkpoint."""
    calibration: str | None
    """The name of the text that the conversion was calibrated with; None without calibration."""
    evaluation: EvaluationRecord | None
    """The result that `npqwen eval --store` stored for this conversion."""
    parts: dict[str, int]
    weights: int
    """Mapped from the files; the system need not keep all of them in memory."""
    context: int
    kv: CacheType
    """Type of the numbers in the cache."""
    cache: int
    """Keys and values of a full context."""
    working: int
    """Buffers of the forward pass, at most."""
    adapters: int
    """All LoRA adapters."""
    available_memory: int | None
    fitting_context: int
    """Tokens of context that fit the available memory together with all weights; 0 if the weights do not fit."""
    possible_context: int
    """Tokens of context that fit if weights may be read from disk for every token."""
    resident_weights: int | None
    """Bytes of the weights that fit the available memory together with a full context."""
    processor: str
    threads: int
    kernels: str
    kernels_available: list[str]

    @property
    def needed(self) -> int:
        """Bytes for everything at this context."""
        return self.weights + self.cache + self.working + self.adapters

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self) | {"needed": self.needed}


def inspect(
    directory: Path,
    context: int | None = None,
    yarn: float | None = None,
    kv: CacheType | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> Info:
    """Inspect a converted directory without loading it.

    context: tokens to count memory for, by default the model's limit. yarn, kv, adapters: as in `npqwen.load`. Raises
    FormatError or CheckpointError for a directory that cannot be loaded, OptionError for a context beyond the limit.
    """

    config = with_yarn(Config.from_directory(directory), yarn)
    context = context_length(config, context)
    weights = Weights(directory, config)
    kv = weights.cache_type if kv is None else check_cache_type(kv)
    parts = dict.fromkeys(PARTS, 0)
    for name, tensor in weights.tensors.items():
        if part := part_of(name):
            parts[part] += tensor.data.size
    matrices = sum(t.data.size for t in weights.tensors.values() if t.dtype == "U8")
    threads = machine.default_threads()
    found = Adapters(check_adapters(adapters), config)
    working = Buffers(config, weights, threads, chunk_size(config), context, rank=found.rank).nbytes
    budget = Budget(
        weights=sum(parts.values()),
        working=working + found.nbytes,
        page=KVCache(config, 1, kv).page_bytes,
        available=machine.available_memory(),
        states=states_bytes(config),
    )
    return Info(
        path=str(directory),
        config=config,
        bits=weights.bits,
        encodings=[encoding.name for encoding in ENCODINGS if encoding.code in weights.encodings],
        parameters=parameters(config),
        bits_per_weight=8 * matrices / weights_in_matrices(config),
        calibration=weights.quantization.calibration,
        evaluation=weights.quantization.evaluation,
        parts={part: size for part, size in parts.items() if size},
        weights=budget.weights,
        context=context,
        kv=kv,
        cache=budget.cache(context),
        working=working,
        adapters=found.nbytes,
        available_memory=budget.available,
        fitting_context=budget.fitting(context),
        possible_context=budget.possible(context),
        resident_weights=budget.resident(context),
        processor=machine.processor(),
        threads=threads,
        kernels=ISA.name,
        kernels_available=[isa.name for isa in available()],
    )


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, of PARTS; "" if no model has it."""
    if name.startswith("mtp."):
        return "draft layer"
    return next((part for part, ends in PARTS.items() if name.rpartition(".")[0].endswith(ends)), "")


def weights_in_matrices(c: Config) -> int:
    """Number of weights in the matrices of a converted model, a tied embedding counted once."""
    return sum(_weights(tensor) for tensor in Layout(c) if not isinstance(tensor, Vector))


def parameters(c: Config) -> int:
    """Number of a checkpoint's parameters."""
    return sum(map(_weights, Layout(c)))


def active_parameters(c: Config) -> int:
    """Number of parameters that one token uses: of a mixture of experts, only the chosen experts.

    An untied embedding, of which a token reads one row, and a draft layer are left out.
    """
    used = [tensor for tensor in Layout(c) if not tensor.name.startswith("mtp.")]
    idle = 0
    if c.mixture is not None:
        others = c.mixture.num_experts - c.mixture.num_experts_per_tok
        stacks = (tensor for tensor in used if isinstance(tensor, Experts))
        idle = sum(_weights(stack) // stack.count * others for stack in stacks)
    unread = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return sum(map(_weights, used)) - idle - unread


def _weights(tensor: Tensor) -> int:
    """Number of weights of a tensor, without padding."""
    if isinstance(tensor, Experts):
        return tensor.count * sum(map(_weights, tensor.matrices(0)))
    return sum(map(math.prod, tensor.sources.values()))


def active_bytes(c: Config, tensors: Iterable[tuple[str, int]]) -> int:
    """Bytes of the weights that one token reads. tensors: names and bytes of all tensors of a converted model.

    Of a mixture of experts it reads the chosen experts. An untied embedding, of which it reads one row, and a draft
    layer are left out.
    """
    total = 0.0
    for name, count in tensors:
        if name.startswith("mtp.") or (name == "model.embed_tokens.weight" and not c.tie_word_embeddings):
            continue
        share = 1.0
        if c.mixture is not None and name.endswith("experts.weight"):
            share = c.mixture.num_experts_per_tok / c.mixture.num_experts
        total += share * count
    return int(total)


def _parameters(info: Info) -> str:
    total, active = info.parameters, active_parameters(info.config)
    return f"{total / 1e6:.1f}M parameters" + (f", {active / 1e6:.1f}M active a token" if info.config.mixture else "")


def _recurrence(c: Config) -> list[tuple[str, str]]:
    """The line about a hybrid's Gated DeltaNet layers."""
    shape, r = RecurrentShape.of(c), c.recurrence
    if shape is None or r is None:
        return []
    keys = f"{r.linear_num_key_heads} key heads of {r.linear_key_head_dim}"
    values = f"{r.linear_num_value_heads} value heads of {r.linear_value_head_dim}"
    where = f"Gated DeltaNet in {shape.layers} of {c.num_hidden_layers} layers, {keys} and {values}"
    kept = f"{size(shape.nbytes)} a state, {size(states_bytes(c))} with all checkpoints"
    return [("recurrence", f"{where}; {kept}")]


def _longest(c: Config) -> str:
    if c.yarn is None:
        return f"{c.longest_context:,}"
    return f"{c.longest_context:,} by YaRN, {c.yarn.factor:g} x {c.yarn.original_max_position_embeddings:,}"


def _fits(info: Info) -> str:
    if info.fitting_context >= info.context:
        return "enough"
    if info.fitting_context:
        return f"enough for {info.fitting_context} tokens of context"
    if info.possible_context:
        return (
            f"too little for weights and cache: it runs with up to {info.possible_context} tokens of context, but "
            "reads weights from disk for every token"
        )
    return "too little to run it"


def _text(calibration: str) -> str:
    return "the model's own text" if calibration == "self" else f"text {calibration}"


def evaluation_line(e: EvaluationRecord) -> str:
    """The evaluation as a line of text."""
    return (
        f"KL divergence {e.kl_divergence:.7f} ± {e.kl_error:.7f}"
        f"{f' from {e.against}' if e.against else ''}, same top-1 {e.top_1:.2%}; {e.tokens} tokens of {e.text}"
    )


def _resident(info: Info, resident: int, chosen: float) -> str:
    """How much of a mixture fits in memory. chosen: the share of the experts that a token uses."""
    experts = info.parts["experts"]
    rest = info.weights - experts
    if resident == info.weights:
        return "all of the weights"
    if resident < rest:
        return f"less than the {size(rest)} of weights outside the experts, which every token uses: very slow"
    missing = info.weights - resident
    return (
        f"all but {size(missing)} of the experts: of the {size(chosen * experts)} that a token uses, about "
        f"{missing / experts:.0%} ({size(chosen * missing)}) are read from disk, less if some are chosen more often"
    )


def describe(info: Info, name: str | None = None) -> str:
    """The facts as lines of text, one each. name: the model's name, if it is not its directory."""
    c = info.config
    heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of {c.head_dim}"
    if c.recurrence is not None:
        heads += f", in {c.recurrence.layer_types.count('full_attention')} of {c.num_hidden_layers} layers"
    mixture = c.mixture
    experts = ""
    if mixture is not None:
        experts = f"{mixture.num_experts} experts of {mixture.moe_intermediate_size}"
        experts += f", {mixture.num_experts_per_tok} a token"
        if mixture.shared_expert_intermediate_size:
            experts += f", and one of {mixture.shared_expert_intermediate_size} that every token uses"
    lines = [
        *([("model", info.path)] if name is None else [("model", name), ("files", info.path)]),
        ("type", f"{c.model_type}, {_parameters(info)}"),
        ("layers", f"{c.num_hidden_layers} of width {c.hidden_size}, feed-forward {c.intermediate_size}"),
        ("attention", heads),
        *_recurrence(c),
        *([("draft layer", "one, which drafts further tokens")] if c.mtp_num_hidden_layers else []),
        *([("mixture", experts)] if mixture is not None else []),
        ("vocabulary", f"{c.vocab_size}, embedding {'tied' if c.tie_word_embeddings else 'not tied'}"),
        ("positions", f"up to {_longest(c)}, rope_theta {c.rope_theta:g}"),
        ("encoding", f"{', '.join(info.encodings)}; {info.bits_per_weight:.2f} bits per weight"),
        *((f"  {part}", size(count)) for part, count in info.parts.items()),
        ("weights", f"{size(info.weights)}, mapped from the files"),
        *([("calibrated", f"with {_text(info.calibration)}")] if info.calibration is not None else []),
        *([("evaluation", evaluation_line(info.evaluation))] if info.evaluation is not None else []),
        ("cache", f"{size(info.cache)} at {info.context} tokens of context, in {info.kv}"),
        ("working", f"{size(info.working)} at most, for {info.threads} threads"),
        *([("adapters", size(info.adapters))] if info.adapters else []),
        ("needed", size(info.needed)),
    ]
    if info.available_memory is not None:
        lines.append(("available", f"{size(info.available_memory)}, {_fits(info)}"))
    if info.resident_weights is not None and mixture is not None and "experts" in info.parts:
        chosen = mixture.num_experts_per_tok / mixture.num_experts
        lines.append(("memory holds", _resident(info, info.resident_weights, chosen)))
    offers = ", ".join(info.kernels_available)
    lines += [("processor", info.processor), ("kernels", f"{info.kernels} (this processor offers {offers})")]
    return "\n".join(f"{name:16}{value}" for name, value in lines)
