"""Names of tensors in checkpoints and adapters of base models, such as Qwen3-Embedding, which have no head."""

from __future__ import annotations

from collections.abc import Iterable

_BESIDE = ("lm_head.", "mtp.")
"""What Qwen3ForCausalLM has beside its base model."""


def is_bare(names: Iterable[str]) -> bool:
    """Whether these are a base model's names, without the leading `model.`."""
    return not any(name.startswith("model.") for name in names)


def prefixed(name: str) -> str:
    """The name in Qwen3ForCausalLM of a bare base model's tensor."""
    return name if name.startswith(_BESIDE) else "model." + name
