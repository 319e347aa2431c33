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

DATA = Path(__file__).parents[1] / "data"
GOLDEN = {**np.load(DATA / "quantized.npz"), **np.load(DATA / "quantized_floats.npz")}
CASES = sorted({name.split("/")[0] for name in GOLDEN if "/" in name})
IN_E4M3 = (
    *("fp8/weight", "mxfp8/weight", "nvfp4/weight_scale"),
    *("float-block/weight", "-channel/weight", "-tensor/weight"),
)
"""Ends of the names of arrays in e4m3; others of bytes are U8."""


def config(case: str) -> dict[str, Any]:
    """What a config.json says of such matrices."""
    library, _, kind = case.partition("-")
    if library == "bitsandbytes":
        return {"quant_method": library, "load_in_8bit": kind == "int8", "bnb_4bit_quant_type": kind[:3]}
    if library == "modelopt":
        # Its exporter writes some names in lower case.
        return {"quant_method": library, "quant_algo": kind.upper() if kind == "nvfp4" else kind}
    if library == "autoround":
        packing = "auto_round:auto_gptq" if "gptq" in kind else "auto_round"
        return {"quant_method": "auto-round", "bits": int(kind[-1]), "group_size": 32, "packing_format": packing}
    if library == "mlx" and "fp" in kind:
        return {"mode": kind, "bits": int(kind[-1]), "group_size": 16 if kind == "nvfp4" else 32}
    if library == "compressed" and kind in ("nvfp4", "mxfp4", "mxfp8"):
        layout = "mxfp8-quantized" if kind == "mxfp8" else f"{kind}-pack-quantized"
        of_floats = {"group_0": {"weights": {"num_bits": int(kind[-1]), "type": "float"}}}
        return {"quant_method": "compressed-tensors", "format": layout, "config_groups": of_floats}
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
    libraries = {case.split("-")[0].removesuffix("_v2") for case in CASES}
    assert libraries == {"autoround", "awq", "bitsandbytes", "compressed", "fp8", "gptq", "mlx", "modelopt"}
    assert len(CASES) == 65


def test_e4m3_is_that_of_pytorch() -> None:
    np.testing.assert_array_equal(E4M3, GOLDEN["e4m3"])


def stored(name: str) -> np.ndarray:
    """An array as write_safetensors takes it."""
    array: np.ndarray = GOLDEN[name]
    is_bytes = array.dtype == np.uint8 and not name.endswith(IN_E4M3)
    return array.view("V1") if is_bytes else array


@pytest.mark.parametrize("case", CASES)
def test_matrices(tmp_path: Path, case: str) -> None:
    parts = {name.split("/")[1]: stored(name) for name in GOLDEN if name.startswith(f"{case}/")}
    meant = parts.pop("meant")
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {f"layer.{part}": values for part, values in parts.items()}, "F32")
    found = format_of({"quantization_config": config(case)}, "a checkpoint")
    assert found is not None
    (tensor,) = found.dequantized(read_tensors(file)).values()
    np.testing.assert_array_equal(tensor.floats(0, len(meant)), meant)
    np.testing.assert_array_equal(tensor.floats(5, 13), meant[5:18])
