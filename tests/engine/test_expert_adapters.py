"""LoRA adapters of experts that share a parameter: held to PEFT's logits, and to adapters of single experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import read_safetensors
from lora import change_config, change_tensors, write_adapter
from npqwen_quant import convert, unquantized
from npqwen_quant.adapter import AdapterFile
from npqwen_quant.checkpoint import Checkpoint
from safetensors.numpy import load_file, save_file

import npqwen
from npqwen.model import load

DATA = Path(__file__).parents[1] / "data"
MIXTURE = DATA / "tiny-qwen3-moe"
KINDS = ("experts", "experts-transposed")
EXPERTS = 12
"""Of the hybrids."""
IDS = np.random.default_rng(1).integers(0, 300, 60)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "model"
    convert(MIXTURE, out, bits=16)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts_live_and_merged(mixture: Path, kind: str) -> None:
    """Of PEFT before and since 0.19, with ranks of a parameter, its alpha, and the router's as a parameter."""
    golden = np.load(DATA / f"{kind}.npz")
    directory, expected = DATA / "adapters" / kind, golden["logits"]
    with load(mixture, threads=2, adapters={"a": directory}) as model:
        live, base = model.logits(golden["ids"], adapter="a")[:, ::8], model.logits(golden["ids"])[:, ::8]
    checkpoint = Checkpoint(MIXTURE, adapters=[AdapterFile(directory)])
    (states,) = unquantized.final_states(checkpoint, golden["ids"][None])
    merged = unquantized.logits(checkpoint, states)[:, ::8]
    assert np.abs(merged - expected).max() < 1e-3
    assert np.abs(live - expected).max() < 2e-3 * np.abs(expected).max()  # its factors are rounded to bf16
    assert np.abs(base - expected).max() > 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["next", "qwen35-moe"])
def test_factors_of_all_experts_are_those_of_each(
    hybrid: Callable[[str, int], Path], tmp_path: Path, name: str, transposed: bool
) -> None:
    single, fused = tmp_path / "single", tmp_path / "fused"
    write_both(single, fused, "model.layers.1.mlp.experts", rank=3, transposed=transposed)
    with load(hybrid(name, 4), threads=2, adapters={"single": single, "fused": fused}) as model:
        found = model.logits(IDS, adapter="fused")
        np.testing.assert_array_equal(found, model.logits(IDS, adapter="single"))
        assert np.abs(found - model.logits(IDS)).max() > 0.1
        adapters = model.adapters
        assert adapters["fused"].rank == adapters["single"].rank == 3
        assert adapters["fused"].nbytes == adapters["single"].nbytes


def write_both(single: Path, fused: Path, module: str, *, rank: int, transposed: bool = False) -> None:
    """An adapter of a hybrid's experts as single matrices, with one A for gate and up, and as parameters."""
    hidden, inner = 128, 64
    shapes = {f"{module}.{n}.gate_up_proj.weight": (2 * inner, hidden) for n in range(EXPERTS)}
    shapes |= {f"{module}.{n}.down_proj.weight": (hidden, inner) for n in range(EXPERTS)}
    write_adapter(single, shapes, ("gate_up_proj", "down_proj"), rank=rank, size=2)
    tensors: dict[str, Any] = load_file(single / "adapter_model.safetensors")
    prefix, stored = f"base_model.model.{module}", {}
    for part, at in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a = np.stack([tensors[f"{prefix}.{n}.{part}.lora_A.weight"] for n in range(EXPERTS)])
        b = np.stack([tensors[f"{prefix}.{n}.{part}.lora_B.weight"] for n in range(EXPERTS)])
        if transposed:
            a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        # PEFT reshapes A to (experts, r, columns), and B to (rows, r, experts).
        stored[f"{prefix}{at}.lora_A.weight"] = a.reshape(-1, a.shape[2]).copy()
        stored[f"{prefix}{at}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1).copy()
    for n in range(EXPERTS):
        a, b = (tensors.pop(f"{prefix}.{n}.gate_up_proj.lora_{factor}.weight") for factor in "AB")
        for i, part in enumerate(("gate_proj", "up_proj")):
            tensors[f"{prefix}.{n}.{part}.lora_A.weight"] = a
            tensors[f"{prefix}.{n}.{part}.lora_B.weight"] = b[i * inner : (i + 1) * inner].copy()
    save_file(tensors, single / "adapter_model.safetensors")
    fused.mkdir()
    config = json.loads((single / "adapter_config.json").read_text())
    config |= {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    (fused / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored, fused / "adapter_model.safetensors")


def tensor(rows: int, columns: int) -> Any:
    return np.ones((rows, columns), np.float32)


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        ((16, 256), (512, 16), None),
        ((16, 256), (256, 16), "adapts square matrices of experts, whose factors may be those of the transposed ones"),
        ((16, 128), (512, 16), "adapts experts of other sizes; is it of another model?"),
        ((12, 256), (512, 12), "model.layers.1.mlp.experts with 12 ranks for the 8 experts of the model"),
        ((8 * 513, 256), (512, 8 * 513), "factors of model.layers.1.mlp.experts have rank 513, but it has only 512"),
    ],
)
def test_what_does_not_fit_is_refused(
    mixture: Path, tmp_path: Path, a: tuple[int, int], b: tuple[int, int], problem: str | None
) -> None:
    name = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"
    directory = write_adapter(tmp_path / "a", {}, (), target_parameters=["experts.gate_up_proj"])
    change_tensors(directory, {name.format("A"): tensor(*a), name.format("B"): tensor(*b)})
    if problem is None:
        load(mixture, threads=1, adapters={"a": directory}).close()
        return
    with pytest.raises(npqwen.CheckpointError) as error:
        load(mixture, adapters={"a": directory})
    assert problem in str(error.value)
    with pytest.raises(npqwen.CheckpointError) as error:
        Checkpoint(MIXTURE, adapters=[AdapterFile(directory)])
    assert problem in str(error.value)


def test_a_dense_model_has_no_experts(tiny: Callable[[int], Path]) -> None:
    with pytest.raises(npqwen.CheckpointError, match="adapts experts, which the model lacks; is it of another model"):
        load(tiny(4), adapters={"a": DATA / "adapters" / "experts"})


def test_experts_are_adapted_once(mixture: Path, tmp_path: Path) -> None:
    shapes = {"model.layers.1.mlp.experts.3.up_proj.weight": (256, 256)}
    directory = write_adapter(tmp_path / "a", shapes, ("up_proj",), rank=2)
    name = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"
    change_tensors(directory, {name.format("A"): tensor(16, 256), name.format("B"): tensor(512, 16)})
    with pytest.raises(npqwen.CheckpointError, match=r"adapts model.layers.1.mlp.experts.3.up_proj.weight twice"):
        load(mixture, adapters={"a": directory})


def test_target_parameters_are_names(mixture: Path, tmp_path: Path) -> None:
    shapes = {name: one.shape for name, one in read_safetensors(MIXTURE / "model.safetensors").items()}
    directory = write_adapter(tmp_path / "a", shapes, ("q_proj",))
    change_config(directory, target_parameters={"q_proj": 1})
    with pytest.raises(npqwen.CheckpointError, match="has target_parameters that are not a list of names"):
        load(mixture, adapters={"a": directory})
