"""LoRA adapters of small random checkpoints, written as PEFT does, and the weights that they make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import to_bf16
from safetensors.numpy import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Weights = dict[str, Any]


def write_adapter(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Iterable[str] = (*ATTENTION, *MLP),
    *,
    rank: int = 5,
    seed: int = 0,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """Write random factors for the matrices among `shapes` (of a checkpoint's tensors) whose module is of `modules`.

    size: about the largest eigenvalue that they add. config: of PEFT's LoraConfig, such as lora_alpha.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.split(".")[-2] in modules:
            module = name.removesuffix(".weight")
            rows, columns = shape
            a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
            tensors[f"base_model.model.{module}.lora_A.weight"] = (a / np.sqrt(columns)).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = (b * size / np.sqrt(rank)).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def change_tensors(directory: Path, changes: Mapping[str, Any]) -> None:
    """Replace tensors of an adapter, or remove those that are None."""
    file = directory / "adapter_model.safetensors"
    tensors: dict[str, Any] = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def change_config(directory: Path, **values: Any) -> None:
    """Replace keys of an adapter's configuration."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def adapted(weights: Mapping[str, Any], directory: Path, scale: float = 1.0) -> Weights:
    """Weights with an adapter merged, its factors rounded to bf16 after B was scaled."""
    found = dict(weights)
    tensors = load_file(directory / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            matrix = name.removeprefix("base_model.model.").replace(".lora_A", "")
            b = rounded(tensors[name.replace("lora_A", "lora_B")] * np.float32(scale))
            found[matrix] = found[matrix] + b @ rounded(a)
    return found


def rounded(values: Any) -> Any:
    """float32 rounded to bf16."""
    return (to_bf16(values).astype(np.uint32) << 16).view(np.float32)
