"""Checkpoints in GPTQ, AWQ, compressed-tensors and for MLX: what their tensors mean, and whole conversions."""

from __future__ import annotations

import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, to_bf16, write_checkpoint, write_safetensors
from npqwen_quant import convert
from npqwen_quant.calibration import Calibration
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.quantized import format_of
from npqwen_quant.recent import Recent
from npqwen_quant.tensors import read_tensors
from quantizers import (
    E4M3,
    MOE,
    UNQUANTIZED,
    Quantizer,
    awq,
    bitsandbytes,
    bitsandbytes_int8,
    check_conversion,
    check_tensors,
    example,
    fp8,
    gptq,
    int_quantized,
    microscaled,
    mlx,
    nvfp4,
    pack_quantized,
    to_e4m3,
    write_quantized,
)
from stacked_experts import stacked


def of_gptq(bits: int = 4, group: int = 16, version: int = 1) -> dict[str, Any]:
    entry = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False}
    return entry | ({} if version == 1 else {"checkpoint_format": "gptq_v2"})


def of_awq(group: int = 16) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


def of_compressed(layout: str, bits: int = 8, kind: str = "int", **weights: Any) -> dict[str, Any]:
    entry = {"num_bits": bits, "type": kind, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": entry, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def fp8_compressed(weights: np.ndarray, block: tuple[int, ...]) -> Any:
    parts, meant = fp8(weights, (block[0], block[1]))
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, meant


def with_offsets(weights: np.ndarray) -> Any:
    parts, meant = fp8_compressed(weights, weights.shape)
    return parts | {name: np.ones(1, np.float32) for name in ("k_scale", "k_bias", "v_bias")}, meant


def fp8_of_powers(weights: np.ndarray, block: tuple[int, int]) -> Any:
    """FP8 whose scales are powers of two in e8m0."""
    parts, _ = fp8(weights, block)
    exponents = np.ceil(np.log2(parts["weight_scale_inv"]))
    wide = np.repeat(np.repeat(np.exp2(exponents), block[0], 0), block[1], 1)[: weights.shape[0], : weights.shape[1]]
    codes = to_e4m3(weights / wide)
    scales = (exponents + 127).astype(np.uint8).view("V1")
    return {"weight": codes, "weight_scale_inv": scales}, E4M3[codes] * wide.astype(np.float32)


def of_autoround(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "data_type": "int"} | changes


def of_modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "ignore": ["lm_head"]}


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT, FLOAT = of_compressed("int-quantized"), of_compressed("float-quantized", kind="float")
CASES: dict[str, tuple[dict[str, Any], Quantizer]] = {
    **{
        f"gptq {bits} bits, v{version}{', act-order' * order}": (
            of_gptq(bits, version=version),
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
    **{
        f"pack-quantized {bits} bits, zero points in int8": (
            of_compressed("pack-quantized", bits),
            partial(pack_quantized, bits=bits, group=16, symmetric=False, int8_zeros=True),
        )
        for bits in (4, 8)
    },
    "int-quantized": (INT, int_quantized),
    "int-quantized, zero points": (INT, partial(int_quantized, symmetric=False)),
    "int-quantized, groups": (of_compressed("naive-quantized"), partial(int_quantized, groups=4)),
    "int-quantized, one scale": (INT, partial(int_quantized, matrix=True)),
    "float-quantized, rows": (FLOAT, lambda w: fp8_compressed(w, (1, w.shape[1]))),
    "float-quantized, one scale": (FLOAT, lambda w: fp8_compressed(w, w.shape)),
    "float-quantized, blocks": (
        of_compressed("float-quantized", kind="float", block_structure=[16, 24]),
        lambda w: fp8_compressed(w, (16, 24)),
    ),
    "float-quantized, blocks in words": (
        of_compressed("float-quantized", kind="float", block_structure="16x24"),
        lambda w: fp8_compressed(w, (16, 24)),
    ),
    "fp8, scales of powers of two": (
        {"quant_method": "fp8", "weight_block_size": [16, 24], "scale_fmt": "ue8m0"},
        lambda w: fp8_of_powers(w, (16, 24)),
    ),
    **{
        f"mlx {bits} bits": ({"group_size": 32, "bits": bits}, partial(mlx, bits=bits, group=32))
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "nvfp4": (of_compressed("nvfp4-pack-quantized", 4, "float"), nvfp4),
    "mxfp4": (of_compressed("mxfp4-pack-quantized", 4, "float"), microscaled),
    "mxfp8": (of_compressed("mxfp8-quantized", 8, "float"), partial(microscaled, bits=8, weight="weight")),
    "mlx mxfp4": (
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        partial(microscaled, weight="weight", words=True),
    ),
    "mlx mxfp8": (
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        partial(microscaled, bits=8, weight="weight", words=True),
    ),
    "modelopt nvfp4": (of_modelopt("NVFP4"), partial(nvfp4, divides=False)),
    "modelopt nvfp4, groups of 32": (of_modelopt("NVFP4"), partial(nvfp4, group=32, divides=False)),
    "modelopt mxfp4": (of_modelopt("MXFP4"), partial(microscaled, weight="weight")),
    "modelopt mxfp8": (of_modelopt("MXFP8"), partial(microscaled, bits=8, weight="weight")),
    "modelopt fp8": (of_modelopt("FP8"), lambda w: fp8_compressed(w, w.shape)),
    "modelopt fp8, rows": (of_modelopt("FP8_PER_CHANNEL_PER_TOKEN"), lambda w: fp8_compressed(w, (1, w.shape[1]))),
    "modelopt fp8, blocks": (of_modelopt("fp8_pb_wo"), lambda w: fp8_compressed(w, (128, 128))),
    "modelopt fp8, keys and values with offsets": (of_modelopt("FP8"), with_offsets),
    "bitsandbytes": (NF4, bitsandbytes),
    "bitsandbytes, double quantization": (NF4, partial(bitsandbytes, double=True)),
    "bitsandbytes, blocks across rows": (NF4, partial(bitsandbytes, block=56, double=True)),
    "bitsandbytes, 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_int8),
    "autoround": (of_autoround(packing_format="auto_round:auto_gptq"), partial(gptq, index=False)),
    "autoround, old": (
        of_autoround(quant_method="intel/auto-round", backend="auto_round:gptq:exllamav2"),
        partial(gptq, index=False),
    ),
    "autoround, zeros as they are": (
        of_autoround(packing_format="auto_round:exllamav2"),
        partial(gptq, index=False, version=2),
    ),
    "autoround, gptqmodel": (of_autoround(packing_format="auto_round:gptqmodel"), partial(gptq, version=2)),
    "autoround, awq": (of_autoround(packing_format="auto_round:auto_awq"), awq),
    "autoround, awq, other groups than most": (
        of_autoround(packing_format="auto_round:auto_awq", group_size=128, extra_config={"x": {"group_size": 16}}),
        awq,
    ),
    "autoround, fp8 in blocks": (
        of_autoround(bits=8, data_type="fp", packing_format="auto_round:fp8", weight_block_size=[16, 24]),
        partial(fp8, block=(16, 24)),
    ),
    "autoround, 5 bits": (of_autoround(bits=5), partial(gptq, bits=5, index=False)),
    "autoround, other bits and groups than most": (
        of_autoround(bits=2, group_size=128, extra_config={"q_proj": {"bits": 4, "group_size": 16}}),
        partial(gptq, index=False),
    ),
    "autoround, nvfp4": (of_autoround(data_type="nv_fp", packing_format="auto_round:nv_fp"), nvfp4),
    "autoround, mxfp4": (of_autoround(data_type="mx_fp", packing_format="auto_round:llm_compressor"), microscaled),
    "mlx f16": ({"group_size": 16, "bits": 4, "mode": "affine"}, partial(mlx, group=16, dtype="F16")),
}


def write(
    directory: Path, case: str, config: dict[str, Any], tensors: dict[str, np.ndarray], **options: Any
) -> dict[str, np.ndarray]:
    """Write a checkpoint in the format of a case, and return what its tensors mean."""
    entry, quantizer = CASES[case]
    of_mlx = case.startswith("mlx")
    config = config | {"quantization" if of_mlx else "quantization_config": entry}
    return write_quantized(directory, config, tensors, quantizer, plain=() if of_mlx else UNQUANTIZED, **options)


def small(**changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A random checkpoint whose sizes are multiples of what the formats pack together."""
    config = make_config(**{"hidden_size": 64, "intermediate_size": 96, **changes})
    return config, random_tensors(config)


@pytest.mark.parametrize("case", CASES)
def test_tensors(tmp_path: Path, case: str) -> None:
    config, tensors = small(tie_word_embeddings=False)
    check_tensors(tmp_path, write(tmp_path, case, config, tensors, shards=2))


@pytest.mark.parametrize(
    "case",
    [
        *("gptq 4 bits, v1, act-order", "awq", "pack-quantized 4 bits, 16, zero points", "int-quantized"),
        *("nvfp4", "modelopt nvfp4", "bitsandbytes", "bitsandbytes, 8 bits", "autoround"),
    ],
)
def test_mixtures_and_bare_names(tmp_path: Path, case: str) -> None:
    config, tensors = small(**MIXTURE | {"moe_intermediate_size": 32})
    check_tensors(tmp_path, write(tmp_path, case, config, tensors, rename=lambda name: name.removeprefix("model.")))


@pytest.mark.parametrize("quantized", [False, True])
def test_stacked_experts_of_mlx(tmp_path: Path, quantized: bool) -> None:
    config, tensors = small(**MIXTURE | {"moe_intermediate_size": 32})
    if not quantized:
        write_checkpoint(tmp_path, config, stacked({name: to_bf16(values) for name, values in tensors.items()}))
        check_tensors(tmp_path, tensors)
        return
    # Some layers have other bits, by the name of all experts at once.
    other = "model.layers.1.mlp.switch_mlp.down_proj"
    entry: dict[str, Any] = {"group_size": 16, "bits": 4, other: {"group_size": 32, "bits": 6}}
    entry |= {"model.layers.1.mlp.gate": {"bits": 8}, "model.layers.0.self_attn.q_proj": False}
    stored, meant = {}, {}
    for name, values in tensors.items():
        if values.ndim == 1 or name == "model.layers.0.self_attn.q_proj.weight":
            stored[name], meant[name] = to_bf16(values), values
            continue
        options: dict[str, Any] = {"bits": 8} if ".mlp.gate." in name and "layers.1" in name else {}
        options = {"bits": 6, "group": 32} if "experts" in name and "down_proj" in name else {"group": 16} | options
        parts, meant[name] = mlx(values, **options)
        stored |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    write_checkpoint(tmp_path, config | {"quantization": entry}, stacked(stored), dtype="F32")
    check_tensors(tmp_path, meant)


@pytest.mark.parametrize(
    "case",
    [
        *("gptq 4 bits, v1, act-order", "awq", "pack-quantized 4 bits, 16, symmetric", "mlx 6 bits"),
        *("nvfp4", "modelopt nvfp4", "mlx mxfp4", "bitsandbytes, double quantization", "autoround"),
    ],
)
def test_conversion(tmp_path: Path, case: str) -> None:
    config, tensors = example()
    meant = write(tmp_path / "in", case, config, tensors, tokenizer=True)
    check_conversion(tmp_path / "in", tmp_path / "out", meant)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in written
    assert written["quantization_config"]["quant_method"] == "npqwen"


def test_conversion_of_a_mixture(tmp_path: Path) -> None:
    config, tensors = example(MOE)
    meant = write(tmp_path / "in", "gptq 4 bits, v1", config, tensors, tokenizer=True)
    check_conversion(tmp_path / "in", tmp_path / "out", meant)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("case", ["gptq 4 bits, v1, act-order", "mlx 4 bits"])
def test_files_are_those_of_the_float32_checkpoint_that_it_means(tmp_path: Path, case: str, calibrated: bool) -> None:
    config, tensors = small(**MIXTURE | {"moe_intermediate_size": 32})
    meant = write(tmp_path / "in", case, config, tensors, shards=2)
    write_checkpoint(tmp_path / "float32", config, meant, dtype="F32")
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 32))
    calibration = Calibration("a text", lambda place: ids) if calibrated else None
    files = []
    for source in ("in", "float32"):
        out = tmp_path / f"{source}-converted"
        convert(tmp_path / source, out, bits=4, threads=2, calibration=calibration)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_gptq_that_describes_itself_in_a_file_of_its_own(tmp_path: Path) -> None:
    config, tensors = small()
    meant = write_quantized(tmp_path, config, tensors, gptq)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "damp_percent": 0.1}))
    check_tensors(tmp_path, meant)
    found = Checkpoint(tmp_path).format
    assert found is not None
    assert found.description == "GPTQ, 4 bits"


def test_modelopt_that_describes_itself_in_a_file_of_its_own(tmp_path: Path) -> None:
    config, tensors = small()
    meant = write_quantized(tmp_path, config, tensors, partial(nvfp4, divides=False))
    entry = {"producer": {"name": "modelopt", "version": "0.41.0"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(entry))
    check_tensors(tmp_path, meant)
    found = Checkpoint(tmp_path).format
    assert found is not None
    assert found.description == "ModelOpt, NVFP4"


def test_weights_that_are_not_quantized_beside_a_quantized_cache(tmp_path: Path) -> None:
    config, tensors = small()
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    check_tensors(tmp_path, write_checkpoint(tmp_path, config, tensors))


def test_autoround_for_mlx(tmp_path: Path) -> None:
    config, tensors = small()
    config["quantization"] = {"group_size": 32, "bits": 4}
    config["quantization_config"] = of_autoround(packing_format="mlx")
    check_tensors(tmp_path, write_quantized(tmp_path, config, tensors, partial(mlx, group=32), plain=()))


def test_layers_of_different_algorithms(tmp_path: Path) -> None:
    config, tensors = small()
    layers = {"model.layers.0.mlp": {"quant_algo": "FP8"}, "model.layers.1.mlp": {"quant_algo": "NVFP4"}}
    entry = of_modelopt("MIXED_PRECISION") | {"quantized_layers": layers}

    def quantizer(weights: np.ndarray) -> Any:
        return nvfp4(weights, divides=False) if len(weights) == 96 else fp8_compressed(weights, weights.shape)

    check_tensors(tmp_path, write_quantized(tmp_path, config | {"quantization_config": entry}, tensors, quantizer))
    found = Checkpoint(tmp_path).format
    assert found is not None
    assert found.description == "ModelOpt, FP8 and NVFP4"


@pytest.mark.parametrize(
    ("entry", "quantizer"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 16, "format": "gptq_v2"}, partial(gptq, version=2)),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "format": "gemm", "backend": "auto"}, awq),
    ],
)
def test_keys_of_newer_libraries(tmp_path: Path, entry: dict[str, Any], quantizer: Quantizer) -> None:
    """transformers 5 and GPTQModel name the layout in "format", and transformers 5 names a kernel in "backend"."""
    config, tensors = small()
    check_tensors(tmp_path, write_quantized(tmp_path, config | {"quantization_config": entry}, tensors, quantizer))


def test_threads_read_one_matrix_at_once(tmp_path: Path) -> None:
    config, tensors = small()
    meant = write(tmp_path, "gptq 4 bits, v1", config, tensors)
    read = Checkpoint(tmp_path).tensors
    names = [name for name in meant if name.endswith("_proj.weight")]
    rng = np.random.default_rng(0)
    pieces = [(names[rng.integers(len(names))], int(rng.integers(60))) for _ in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda piece: read[piece[0]].floats(piece[1], 4), pieces))
    for (name, first), rows in zip(pieces, found, strict=True):
        np.testing.assert_array_equal(rows, meant[name][first : first + 4])


@pytest.mark.parametrize(
    "case",
    [
        *("gptq 4 bits, v1", "awq", "pack-quantized 4 bits, 16, zero points", "mlx 4 bits"),
        *("nvfp4", "bitsandbytes, double quantization"),
    ],
)
def test_memory_of_reading(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece takes a few times its float32 values, whatever the matrix; of transposed matrices, three are held."""
    monkeypatch.setattr("npqwen_quant.recent._BYTES", 0)
    rows, columns, piece = 2048, 512, 64
    weights = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    entry, quantizer = CASES[case]
    parts = quantizer(weights)[0]
    stored = {f"layer{i}.{part}": values for i in range(6) for part, values in parts.items()}
    write_safetensors(tmp_path / "model.safetensors", stored, "F32")
    form = format_of({"quantization_config": entry}, "a checkpoint")
    assert form is not None
    tensors = form.dequantized(read_tensors(tmp_path / "model.safetensors"))
    tracemalloc.start()
    try:
        for tensor in tensors.values():
            for first in range(0, rows, piece):
                tensor.read(first, piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    transposed = case.startswith(("gptq", "awq"))
    # While a fourth one is loaded: the integers, scales in float32 and zeros.
    held = 4 * rows * columns * (1 / 2 + 5 / 16) + rows * columns / 4 if transposed else 0
    assert peak < held + 8 * 4 * piece * columns


def test_few_matrices_stay_in_memory() -> None:
    recent: Recent[np.ndarray] = Recent()
    loads: list[int] = []
    lock = threading.Lock()

    def load(key: int, nbytes: int) -> np.ndarray:
        with lock:
            loads.append(key)
        return np.broadcast_to(np.uint8(0), nbytes)  # takes no memory

    for key in (0, 1, 2, 0, 3, 1, 0):
        recent.get(key, lambda key=key: load(key, 50 << 20))  # type: ignore[misc]
    assert loads == [0, 1, 2, 3, 1]
    loads.clear()
    for key in [*range(10, 20), 10]:
        recent.get(key, lambda key=key: load(key, 1 << 20))  # type: ignore[misc]
    assert loads == list(range(10, 20))
