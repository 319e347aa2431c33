"""Checkpoints in GPTQ, AWQ, compressed-tensors and for MLX: what their tensors mean, and whole conversions."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors
from quantizers import (
    MOE,
    Quantizer,
    awq,
    check_conversion,
    check_tensors,
    example,
    fp8,
    gptq,
    int_quantized,
    mlx,
    pack_quantized,
    write_quantized,
)

SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Multiples of what the formats pack together."""


def of_gptq(bits: int = 4, group: int = 16, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False, **more}


def of_awq(group: int = 16) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


def of_compressed(layout: str, bits: int, kind: str = "int", **weights: Any) -> dict[str, Any]:
    entry = {"num_bits": bits, "type": kind, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": entry, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def fp8_compressed(weights: np.ndarray, block: tuple[int, int]) -> Any:
    parts, meant = fp8(weights, block)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, meant


CASES: dict[str, tuple[dict[str, Any], Quantizer]] = {
    **{
        f"gptq {bits} bits, v{version}{', act-order' * order}": (
            of_gptq(bits, **({"checkpoint_format": "gptq_v2"} if version == 2 else {})),
            partial(gptq, bits=bits, act_order=order, version=version),
        )
        for bits in (2, 3, 4, 8)
        for version in (1, 2)
        for order in (False, True)
    },
    "gptq without g_idx": (of_gptq(), partial(gptq, index=False)),
    "gptq, one group": (of_gptq(group=-1), partial(gptq, group=-1, index=False)),
    "gptq, a last group that is smaller": (of_gptq(group=40), partial(gptq, group=40, index=False)),
    "gptq, other bits than most": (of_gptq(bits=8), gptq),
    "awq": (of_awq(), awq),
    "awq, one group": (of_awq(-1), partial(awq, group=-1)),
    **{
        f"pack-quantized {bits} bits, {group}, {'symmetric' if symmetric else 'zero points'}{', act-order' * order}": (
            of_compressed("pack-quantized", bits),
            partial(pack_quantized, bits=bits, group=group, symmetric=symmetric, act_order=order),
        )
        for bits in (3, 4, 8)
        for group, order in ((-1, False), (16, False), (16, True))
        for symmetric in (True, False)
    },
    "int-quantized": (of_compressed("int-quantized", 8), int_quantized),
    "int-quantized, zero points": (of_compressed("int-quantized", 8), partial(int_quantized, symmetric=False)),
    "int-quantized, groups": (of_compressed("naive-quantized", 8), partial(int_quantized, groups=4)),
    "int-quantized, one scale": (of_compressed("int-quantized", 8), partial(int_quantized, matrix=True)),
    "float-quantized, rows": (of_compressed("float-quantized", 8, "float"), lambda w: fp8_compressed(w, (1, w.shape[1]))),
    "float-quantized, blocks": (
        of_compressed("float-quantized", 8, "float", block_structure=[16, 24]),
        lambda w: fp8_compressed(w, (16, 24)),
    ),
    "float-quantized, one scale": (
        of_compressed("float-quantized", 8, "float"),
        lambda w: fp8_compressed(w, w.shape),  # type: ignore[arg-type]
    ),
    **{f"mlx {bits} bits": ({"group_size": 32, "bits": bits}, partial(mlx, bits=bits, group=32)) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx f16": ({"group_size": 16, "bits": 4, "mode": "affine"}, partial(mlx, group=16, dtype="F16")),
}


def write(directory: Path, case: str, shards: int = 1, **changes: Any) -> dict[str, np.ndarray]:
    entry, quantizer = CASES[case]
    key = "quantization" if case.startswith("mlx") else "quantization_config"
    config = make_config(**SIZES, **{key: entry}, **changes)
    if "mixture" in changes:
        config |= MIXTURE
    tensors = random_tensors(config)
    if case.startswith("awq"):
        changes["vocab_size"] = 208
    plain = () if case.startswith("mlx") else ("embed_tokens", "lm_head", "mlp.gate.")
    return write_quantized(directory, config, tensors, quantizer, plain=plain, shards=shards)


@pytest.mark.parametrize("case", CASES)
def test_tensors(tmp_path: Path, case: str) -> None:
    check_tensors(tmp_path, write(tmp_path, case, shards=2, tie_word_embeddings=False))
