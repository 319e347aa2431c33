"""Hybrids in other styles and formats: experts in one tensor, quantized already, as MLX stores them, shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import from_bf16, read_safetensors, to_bf16, write_safetensors
from gguf_hybrids import hybrid_gguf
from hybrids import HYBRIDS, draft_tensors, hybrid_checkpoint
from npqwen_quant import Shards, convert, convert_shards
from npqwen_quant.adapter import AdapterFile
from npqwen_quant.checkpoint import Checkpoint
from quantizers import Quantizer, awq, bitsandbytes, fp8, gptq, mlx, nvfp4
from stacked_experts import fused

from npqwen.errors import CheckpointError

Stored = dict[str, np.ndarray]


def rewritten(name: str, place: Path, change: Callable[[Stored], Stored], **entries: Any) -> Path:
    """A hybrid's checkpoint with its tensors (float32) changed, and with further entries in config.json."""
    directory = hybrid_checkpoint(name, place)
    bits = read_safetensors(directory / "model.safetensors")
    floats = {key: (values.astype(np.uint32) << 16).view(np.float32) for key, values in bits.items()}
    write_safetensors(directory / "model.safetensors", change(floats), "F32")
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps(config | entries))
    return directory


def equal(found: Path, want: Path, bits: int = 16) -> None:
    """Whether two checkpoints are one model."""
    for source in (found, want):
        convert(source, source.with_name(f"{source.name}-{bits}"), bits)
    outs = [source.with_name(f"{source.name}-{bits}") / "model.safetensors" for source in (found, want)]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def plain(stored: Stored) -> Stored:
    return stored


def is_quantized(name: str) -> bool:
    """As in the hub's checkpoints: not the gates, nor what is no matrix."""
    matrices = "_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight", ".in_proj_qkvz.weight"
    return name.endswith(matrices) and "visual" not in name


FORMATS: dict[str, tuple[dict[str, Any], Quantizer]] = {
    # Blocks of 24 rows: heads of 32 begin anywhere in them.
    "fp8": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [24, 40]}},
        partial(fp8, block=(24, 40)),
    ),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}},
        partial(gptq, act_order=True),
    ),
    "awq": (
        {
            "quantization_config": {
                "quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True,
            }
        },
        awq,
    ),
    "modelopt": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        partial(nvfp4, divides=False),
    ),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
        partial(bitsandbytes, block=56, double=True),
    ),
}  # fmt: skip


def quantize(stored: Stored, quantizer: Quantizer, meant: bool) -> Stored:
    """Tensors with the matrices quantized; meant: with the float32 weights that these mean in their places."""
    found: Stored = {}
    for name, values in stored.items():
        if not is_quantized(name):
            found[name] = values
            continue
        parts, weights = quantizer(values)
        module = name.removesuffix(".weight")
        found |= {name: weights} if meant else {f"{module}.{kind}": part for kind, part in parts.items()}
    return found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["next", "qwen35"])
def test_quantized_already(tmp_path: Path, kind: str, name: str) -> None:
    entry, quantizer = FORMATS[kind]
    found = rewritten(name, tmp_path / "in", partial(quantize, quantizer=quantizer, meant=False), **entry)
    equal(found, rewritten(name, tmp_path / "meant", partial(quantize, quantizer=quantizer, meant=True)))


def as_mlx(stored: Stored) -> Stored:
    """Norms as factors, the taps of convolutions in the middle, and names as in mlx-vlm."""
    found: Stored = {}
    for name, values in stored.items():
        own = name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "vision_tower.")
        if name.endswith("norm.weight") and "linear_attn" not in name:
            found[own] = values + np.float32(1)
        elif name.endswith("conv1d.weight"):
            found[own] = np.ascontiguousarray(values.swapaxes(1, 2))
        else:
            found[own] = values
    return found


@pytest.mark.parametrize("name", HYBRIDS)
def test_as_mlx_stores_them(tmp_path: Path, name: str) -> None:
    # 1 + w - 1 is not w in float32, but 1 + w is.
    equal(rewritten(name, tmp_path / "in", as_mlx), rewritten(name, tmp_path / "plain", plain))


def test_quantized_by_mlx(tmp_path: Path) -> None:
    """With other bits for some layers, by their names."""
    quantizer = partial(mlx, bits=4, group=32)

    def change(stored: Stored, meant: bool) -> Stored:
        changed = quantize(stored, quantizer, meant)
        for name in [name for name in stored if name.endswith("in_proj_a.weight")]:
            parts, weights = mlx(changed.pop(name), bits=8, group=32)
            module = name.removesuffix(".weight")
            changed |= {name: weights} if meant else {f"{module}.{kind}": part for kind, part in parts.items()}
        return changed if meant else as_mlx(changed)

    gates = [f"language_model.model.layers.{layer}.linear_attn.in_proj_a" for layer in range(3)]
    entry = {"bits": 4, "group_size": 32, **{gate: {"bits": 8, "group_size": 32} for gate in gates}}
    found = rewritten("qwen35", tmp_path / "in", partial(change, meant=False), quantization=entry)
    equal(found, rewritten("qwen35", tmp_path / "meant", partial(change, meant=True)))


@pytest.mark.parametrize("name", ["next", "qwen35-moe"])
def test_experts_in_two_tensors(tmp_path: Path, name: str) -> None:
    equal(
        rewritten(name, tmp_path / "in", fused),
        rewritten(name, tmp_path / "plain", plain),
    )


def with_draft(stored: Stored) -> Stored:
    bits = {name: to_bf16(values) for name, values in stored.items()}
    return stored | {name: from_bf16(values) for name, values in draft_tensors(bits).items()}


@pytest.mark.parametrize("name", HYBRIDS)
def test_draft_layers_are_found_under_any_prefix(tmp_path: Path, name: str) -> None:
    def prefixed(stored: Stored) -> Stored:
        prefix = "model.language_model." if name == "qwen35" else "model."
        return {f"{prefix}{key}" if key.startswith("mtp.") else key: x for key, x in with_draft(stored).items()}

    for place, change in (("in", with_draft), ("prefixed", prefixed)):
        directory = rewritten(name, tmp_path / place, change)
        checkpoint = Checkpoint(directory)
        assert checkpoint.config.mtp_num_hidden_layers == 1
        assert checkpoint.has_images == (name != "next")
        convert(directory, tmp_path / f"{place} converted", 16)
    files = [(tmp_path / f"{place} converted" / "model.safetensors").read_bytes() for place in ("in", "prefixed")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["qwen35", "qwen35-moe"])
def test_the_text_part_saved_alone(tmp_path: Path, name: str) -> None:
    """transformers writes it with a text model's config.json, under the names of the whole."""
    whole = rewritten(name, tmp_path / "whole", with_draft)
    directory = rewritten(name, tmp_path / "text", lambda stored: {
        key: values for key, values in with_draft(stored).items() if "visual" not in key
    })  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    text = {key: value for key, value in config.items() if key != "text_config"} | config["text_config"]
    text |= {"model_type": f"{config['model_type']}_text", "architectures": ["Qwen3_5ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(text))
    assert not Checkpoint(directory).has_images
    equal(whole, directory)
    convert_shards(directory, tmp_path / "out", in_shards(directory, anywhere))


def in_shards(directory: Path, shard_of: Callable[[str], int]) -> Shards:
    """Move a checkpoint's tensors into shards elsewhere."""
    raw = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    numpy = {"F32": "<f4", "BF16": "<u2", "F8_E4M3": "u1"}
    shards: dict[str, Stored] = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(raw[start:stop], numpy[entry["dtype"]]).reshape(entry["shape"])
        shards.setdefault(f"model-{shard_of(name)}.safetensors", {})[name] = values
    there = directory.with_name(f"{directory.name} there")
    there.mkdir()
    for shard, tensors in shards.items():
        write_safetensors(there / shard, tensors, "F32")
    (directory / "model.safetensors").unlink()
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def fetch(name: str, place: Path) -> Path:
        if not (place / name).exists():
            assert not [*place.glob("*.safetensors")]  # one at a time
            shutil.copyfile(there / name, place / name)
        return place / name

    return Shards("1", {path.name: path.stat().st_size for path in there.iterdir()}, fetch)


def anywhere(name: str) -> int:
    return sum(name.encode()) % 4


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", HYBRIDS)
def test_shard_by_shard(tmp_path: Path, name: str) -> None:
    directory = rewritten(name, tmp_path / "in", with_draft)
    convert(directory, tmp_path / "want")
    convert_shards(directory, tmp_path / "out", in_shards(directory, anywhere))
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.parametrize("name", ["next", "qwen35"])
def test_fp8_shard_by_shard(tmp_path: Path, name: str) -> None:
    """With weights in one shard and scales in another one."""
    entry, quantizer = FORMATS["fp8"]
    directory = rewritten(name, tmp_path / "in", partial(quantize, quantizer=quantizer, meant=False), **entry)
    convert(directory, tmp_path / "want")
    convert_shards(directory, tmp_path / "out", in_shards(directory, anywhere))
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_mlx_shard_by_shard(tmp_path: Path) -> None:
    """In floats, which config.json does not tell from transformers': the names do."""
    directory = rewritten("qwen35", tmp_path / "in", as_mlx)
    convert(directory, tmp_path / "want")
    convert_shards(directory, tmp_path / "out", in_shards(directory, anywhere))
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_mlx_under_other_names_shard_by_shard_is_refused(tmp_path: Path) -> None:
    directory = rewritten("next", tmp_path / "in", as_mlx)
    with pytest.raises(CheckpointError, match=r"stores its tensors as MLX does, .* without low_disk"):
        convert_shards(directory, tmp_path / "out", in_shards(directory, anywhere))
    assert not (tmp_path / "out").exists()


def lora(place: Path, stored: Stored, modules: tuple[str, ...]) -> Stored:
    """Write an adapter of some modules, by the ends of their names; returns the tensors with it merged."""
    rng = np.random.default_rng(7)
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    factors: Stored = {}
    merged = dict(stored)
    for name in [name for name in stored if name.endswith(modules) and "visual" not in name]:
        a, b = (rng.normal(size=shape).astype(np.float32) / 8 for shape in ((2, 128), (len(stored[name]), 2)))
        module = "base_model.model." + name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        product = 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
        merged[name] = stored[name] + product.astype(np.float32)
    write_safetensors(place / "adapter_model.safetensors", factors, "F32")
    return merged


@pytest.mark.parametrize("name", ["next", "qwen35"])
def test_adapters_are_merged_before_matrices_are_taken_apart(tmp_path: Path, name: str) -> None:
    modules = ("q_proj.weight", "in_proj_qkvz.weight", "in_proj_ba.weight", "in_proj_a.weight", "out_proj.weight")
    source = rewritten(name, tmp_path / "in", plain)
    want = rewritten(name, tmp_path / "merged", lambda stored: lora(tmp_path / "adapter", stored, modules))
    convert(source, tmp_path / "out", 16, adapters=[AdapterFile(tmp_path / "adapter")])
    convert(want, tmp_path / "want", 16)
    found, expected = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "want"))
    assert found == expected


def test_adapters_are_not_merged_into_mlx_nor_gguf(tmp_path: Path) -> None:
    source = rewritten(
        "qwen35", tmp_path / "in", lambda stored: as_mlx(lora(tmp_path / "adapter", stored, ("q_proj",)))
    )
    for one in (source, hybrid_gguf("qwen35", tmp_path)):
        with pytest.raises(CheckpointError, match="merge them into the original checkpoint"):
            Checkpoint(one, adapters=[AdapterFile(tmp_path / "adapter")])
