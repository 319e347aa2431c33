"""The text part of Qwen3-VL checkpoints.

That Qwen3VLForConditionalGeneration computes the logits of Qwen3 from these weights, for text alone, was measured with
transformers 5.24: the largest difference is 7e-6, dense and mixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, to_bf16, write_checkpoint
from npqwen_quant import Shards, convert, convert_shards
from quantizers import MOE, check_conversion, check_tensors, example, fp8, mlx
from stacked_experts import fused

from npqwen.errors import CheckpointError
from npqwen.format.config import Config
from npqwen.format.text_part import text_part


def multimodal(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config.json in the style of the hub's Qwen3-VL."""
    text = {key: value for key, value in config.items() if key != "architectures"}
    kind = "qwen3_vl_moe" if config["model_type"] == "qwen3_moe" else "qwen3_vl"
    text |= {
        "model_type": f"{kind}_text",
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    }
    text.pop("norm_topk_prob", None)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "vision_config": {"depth": 1, "hidden_size": 32},
        "image_token_id": 151655,
        "tie_word_embeddings": config["tie_word_embeddings"],
        **changes,
    }


def with_images(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    return found | {"model.visual.patch_embed.proj.weight": np.ones((3, 4, 5), np.float32)}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("style", ["hub", "v5"])
def test_tensors(tmp_path: Path, style: str, changes: dict[str, Any]) -> None:
    config = make_config(style, **changes)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, multimodal(config), with_images(tensors), shards=2)
    check_tensors(tmp_path, tensors)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("inner", [40, 36, 72])
def test_experts_in_two_tensors(tmp_path: Path, inner: int, transposed: bool) -> None:
    """inner: half of hidden_size, and as large, make one of the two square."""
    config = make_config(**MIXTURE | {"moe_intermediate_size": inner})
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, multimodal(config), with_images(fused(tensors, transposed)))
    check_tensors(tmp_path, tensors)


@pytest.mark.parametrize("source", [None, MOE], ids=["dense", "mixture"])
def test_conversion(tmp_path: Path, source: Path | None) -> None:
    config, tensors = example() if source is None else example(source)
    stored = {name: to_bf16(values) for name, values in tensors.items()}
    write_checkpoint(tmp_path / "in", multimodal(config), with_images(fused(stored, transposed=True)), tokenizer=True)
    check_conversion(tmp_path / "in", tmp_path / "out", tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == config["architectures"]
    assert "text_config" not in written
    assert Config.from_directory(tmp_path / "out") == Config.from_dict(config)


def test_quantized(tmp_path: Path) -> None:
    config = make_config()
    stored, meant = {}, {}
    for name, values in random_tensors(config).items():
        if values.ndim == 1 or "embed" in name:
            stored[name], meant[name] = to_bf16(values), values
            continue
        parts, meant[name] = fp8(values, (16, 24))
        stored |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    entry = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    write_checkpoint(tmp_path, multimodal(config, quantization_config=entry), with_images(stored), dtype="F32")
    check_tensors(tmp_path, meant)


def test_names_of_mlx(tmp_path: Path) -> None:
    config = make_config(hidden_size=64, intermediate_size=96)
    stored, meant = {}, {}
    for name, values in random_tensors(config).items():
        if values.ndim == 1:
            stored[f"language_model.{name}"], meant[name] = to_bf16(values), values
            continue
        parts, meant[name] = mlx(values, group=32)
        stored |= {f"language_model.{name}".removesuffix("weight") + end: part for end, part in parts.items()}
    stored["vision_tower.patch_embed.proj.weight"] = np.ones((3, 4, 5), np.float32)
    config = multimodal(config, quantization={"group_size": 32, "bits": 4})
    write_checkpoint(tmp_path, config, stored, dtype="F32")
    check_tensors(tmp_path, meant)


def test_what_is_no_qwen3_vl_stays_as_it_is() -> None:
    for raw in (
        {},
        {"model_type": "qwen3"},
        {"model_type": "qwen3_vl"},
        {"model_type": "qwen3_vl", "text_config": [1]},
    ):
        assert text_part(raw) is None
    assert text_part({"model_type": "qwen2_5_vl", "text_config": {}}) is None
    assert text_part({"model_type": ["qwen3_vl"], "text_config": {}}) is None


def damaged(edit: Callable[[dict[str, np.ndarray]], object]) -> dict[str, np.ndarray]:
    tensors = with_images(fused(random_tensors(make_config(**MIXTURE)), transposed=True))
    edit(tensors)
    return tensors


LAYER = "model.language_model.layers.1.mlp.experts"
REFUSED: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "no down": (lambda t: t.pop(f"{LAYER}.down_proj"), r"no tensor model\.layers\.1\.mlp\.experts\.0\.down_proj"),
    "no gate": (lambda t: t.pop(f"{LAYER}.gate_up_proj"), r"no tensor model\.layers\.1\.mlp\.experts\.0\.gate_proj"),
    "fewer experts": (
        lambda t: t.update({f"{LAYER}.down_proj": t[f"{LAYER}.down_proj"][:3]}),
        r"down_proj has shape \[3, 40, 72\]; config.json has 5 experts",
    ),
    "two dimensions": (
        lambda t: t.update({f"{LAYER}.down_proj": t[f"{LAYER}.down_proj"][:, 0]}),
        r"down_proj has shape \[5, 72\]; config.json has 5 experts",
    ),
    "another inner size": (
        lambda t: t.update({f"{LAYER}.down_proj": t[f"{LAYER}.down_proj"][:, :39].copy()}),
        r"down_proj has shape \[5, 39, 72\], but config.json says \[5, 72, 40\]",
    ),
    "empty": (
        lambda t: t.update({f"{LAYER}.down_proj": np.ones((5, 0, 72), np.float32)}),
        r"down_proj has shape \[5, 0, 72\]",
    ),
    "integers": (
        lambda t: t.update({f"{LAYER}.down_proj": np.ones((5, 40, 72), np.int64)}),
        "down_proj.weight is stored as I64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    edit, message = REFUSED[case]
    write_checkpoint(tmp_path / "in", multimodal(make_config(**MIXTURE)), damaged(edit))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_low_disk(tmp_path: Path) -> None:
    """Shard by shard, of which one has nothing but images, that is not fetched."""
    config = make_config(tie_word_embeddings=False)
    tensors = with_images(random_tensors(config))
    write_checkpoint(tmp_path / "in", multimodal(config), tensors, shards=len(tensors))
    convert(tmp_path / "in", tmp_path / "want")
    fetched: list[str] = []

    def fetch(name: str, place: Path) -> Path:
        fetched.append(name)
        return tmp_path / "in" / name

    files = {path.name: path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors")}
    convert_shards(tmp_path / "in", tmp_path / "out", Shards("key", files, fetch))
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert len(fetched) == len(files) - 1
