"""Matrices that other libraries quantized, against what those libraries make of them (tests/data/make_quantized.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_safetensors
from npqwen_quant.fp8 import E4M3
from npqwen_quant.quantized import format_of
from npqwen_quant.tensors import read_tensors

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "quantized.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files if "/" in name})


def config(case: str) -> dict[str, Any]:
    """What a config.json says of such matrices."""
    found = re.search(r"\d", case)
    bits = int(found[0]) if found else 8
    if case == "fp8":
        return {"quant_method": "fp8", "weight_block_size": [8, 16]}
    if case == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}
    if case.startswith("gptq"):
        return {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": case.split("-")[0]}
    if case.startswith("mlx"):
        return {"bits": bits, "group_size": 32}
    weights: dict[str, Any] = {"num_bits": bits, "block_structure": [24, 40] if "block" in case else None}
    kind = "pack" if found else case.split("-")[1]
    group = {"targets": ["Linear"], "weights": weights, "format": f"{kind}-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def test_all_formats_are_there() -> None:
    assert {case.split("-")[0].removesuffix("_v2") for case in CASES} == {"awq", "compressed", "fp8", "gptq", "mlx"}
    assert len(CASES) == 42


def test_e4m3_is_that_of_pytorch() -> None:
    np.testing.assert_array_equal(E4M3, GOLDEN["e4m3"])


@pytest.mark.parametrize("case", CASES)
def test_matrices(tmp_path: Path, case: str) -> None:
    parts = {name.split("/")[1]: GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{case}/")}
    meant = parts.pop("meant")
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {f"layer.{part}": values for part, values in parts.items()}, "F32")
    found = format_of({"quantization_config": config(case)}, "a checkpoint")
    assert found is not None
    (tensor,) = found.dequantized(read_tensors(file)).values()
    np.testing.assert_array_equal(tensor.floats(0, len(meant)), meant)
    np.testing.assert_array_equal(tensor.floats(5, 13), meant[5:18])
