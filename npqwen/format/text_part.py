"""The text part of multimodal checkpoints, which is an ordinary Qwen3 model.

These are Qwen3-VL and Qwen3.5. For text alone, the rotary embedding's three positions per token (time, height, width)
are equal, and only images add to hidden states (Qwen3VLTextModel in transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MODEL_TYPES = {
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
_SHARED = (
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "quantization",
    "transformers_version",
)
"""Keys of the text model that may be beside text_config."""
_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
"""Prefixes of names in transformers and in mlx-vlm, and what replaces them."""
_OF_IMAGES = ("model.visual.", "visual.", "vision_tower.")


def text_part(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json that the text part would have on its own; None for a config.json of a text model.

    The values are not checked.
    """
    model_type = raw.get("model_type")
    text = raw.get("text_config")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES or not isinstance(text, dict):
        return None
    of_text = _MODEL_TYPES[model_type]
    shared = {key: raw[key] for key in _SHARED if raw.get(key) is not None}
    part = {**shared, **text, "model_type": of_text, "architectures": [_ARCHITECTURES[of_text]]}
    if "tie_word_embeddings" in shared:
        part["tie_word_embeddings"] = shared["tie_word_embeddings"]
    if of_text == "qwen3_moe":
        part["norm_topk_prob"] = True  # Qwen3VLMoe has no such key and does so
    return part


def text_name(name: str) -> str | None:
    """The name that a multimodal checkpoint's tensor has in the text model; None for one of images."""
    if name.startswith(_OF_IMAGES):
        return None
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name[len(prefix) :]
    return name
