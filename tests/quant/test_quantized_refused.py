"""Quantized checkpoints that are incomplete, damaged or hostile: one line each."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, random_tensors, to_bf16, write_safetensors
from npqwen_quant import convert
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.plan import plan
from quantizers import (
    UNQUANTIZED,
    Quantizer,
    awq,
    bitsandbytes,
    bitsandbytes_int8,
    fp8,
    gptq,
    int_quantized,
    microscaled,
    mlx,
    nvfp4,
    pack_quantized,
)
from stacked_experts import stacked

from npqwen.errors import CheckpointError
from npqwen.format.recipe import recipe_of

PROJ = "model.layers.0.self_attn.k_proj"
Stored = dict[str, np.ndarray]

ENTRIES: dict[str, tuple[dict[str, Any], Quantizer]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 24]}, lambda w: fp8(w, (16, 24))),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"},
        lambda w: gptq(w, act_order=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
    "pack": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 16}}},
        },
        lambda w: pack_quantized(w, group=16, symmetric=False, act_order=True),
    ),
    "int8": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": [8, 8]}}},
        },
        lambda w: int_quantized(w, symmetric=False),
    ),
    "nvfp4": (
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
        },
        nvfp4,
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "quantized_layers": {"layer": {"quant_algo": "FP8"}}},
        lambda w: nvfp4(w, divides=False),
    ),
    "mxfp8": (
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        lambda w: microscaled(w, bits=8, weight="weight"),
    ),
    "bnb": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda w: bitsandbytes(w, double=True),
    ),
    "bnb8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_int8),
    "autoround": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "data_type": "int", "extra_config": {"x": {}}},
        lambda w: gptq(w, index=False),
    ),
    "mlx": (
        {"bits": 4, "group_size": 16, "mode": "affine", "model.layers.0.mlp.gate": {"bits": 8}},
        lambda w: mlx(w, 8 if len(w) == 4 else 4, group=16),
    ),
}


def made(form: str) -> tuple[dict[str, Any], Stored]:
    """config.json and the stored tensors of a small mixture in a format."""
    entry, quantizer = ENTRIES[form]
    config = make_config(
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        hidden_size=64,
        num_hidden_layers=1,
        vocab_size=32,
    )
    stored: Stored = {}
    for name, values in random_tensors(config).items():
        if values.ndim == 1 or (form != "mlx" and any(part in name for part in UNQUANTIZED)):
            stored[name] = to_bf16(values)
        else:
            stored |= {name.removesuffix("weight") + end: part for end, part in quantizer(values)[0].items()}
    config["quantization" if form == "mlx" else "quantization_config"] = copy.deepcopy(entry)
    return config, stacked_layer(stored) if form == "mlx" else stored


def stacked_layer(stored: Stored) -> Stored:
    """`stacked`, of a model of one layer."""
    second = {name.replace("layers.0.", "layers.1."): values for name, values in stored.items()}
    return {name: values for name, values in stacked(stored | second).items() if "layers.1." not in name}


def write(directory: Path, config: dict[str, Any], stored: Stored) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", stored, "F32")


def read_all(directory: Path) -> None:
    """Read every weight of a checkpoint."""
    checkpoint = Checkpoint(directory)
    for planned in plan(checkpoint.config, recipe_of(16)):
        for name, shape in planned.sources.items():
            checkpoint.tensor(name, shape).floats(0, shape[0])


Edit = Callable[[dict[str, Any], Stored], object]


def part(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Change a tensor."""
    return lambda config, stored: stored.update({name: np.ascontiguousarray(values(stored[name]))})


def without(name: str) -> Edit:
    return lambda config, stored: stored.pop(name)


def entry(**changes: Any) -> Edit:
    return lambda config, stored: config["quantization_config"].update(changes)


def weights(**changes: Any) -> Edit:
    return lambda config, stored: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def of_mlx(**changes: Any) -> Edit:
    return lambda config, stored: config["quantization"].update(changes)


STATE = "weight.quant_state.bitsandbytes__nf4"


def described(**changes: Any) -> Edit:
    """Change what bitsandbytes says of a matrix."""

    def edit(state: np.ndarray) -> np.ndarray:
        text = json.dumps({**json.loads(state.tobytes()), **changes})
        return np.frombuffer(text.encode(), np.uint8).view("V1")

    return part(f"{PROJ}.{STATE}", edit)


UP = "model.layers.0.mlp.switch_mlp.up_proj"
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "gptq: no scales": ("gptq", without(f"{PROJ}.scales"), f"no {PROJ}.scales, though the layer is quantized"),
    "gptq: no zeros": ("gptq", without(f"{PROJ}.qzeros"), f"no {PROJ}.qzeros, though"),
    "gptq: no weights": ("gptq", without(f"{PROJ}.qweight"), f"no {PROJ}.qweight, though"),
    "gptq: a group too many": (
        "gptq",
        part(f"{PROJ}.g_idx", lambda g: g + 1),
        "g_idx names a group that is not one of 4",
    ),
    "gptq: a negative group": ("gptq", part(f"{PROJ}.g_idx", lambda g: g - 1), "g_idx names a group that is not one"),
    "gptq: fewer groups than columns": (
        "gptq",
        part(f"{PROJ}.g_idx", lambda g: g[:40]),
        "g_idx has 40 columns, but qweight has 8 rows of words",
    ),
    "gptq: scales of fewer rows": (
        "gptq",
        part(f"{PROJ}.scales", lambda s: s[:, :-1]),
        r"scales has shape \[4, 63\], but other parts of the layer need \[4, 64\]",
    ),
    "gptq: zeros of fewer groups": ("gptq", part(f"{PROJ}.qzeros", lambda z: z[:-1]), r"qzeros has shape \[3, 8\]"),
    "gptq: zeros of no known width": ("gptq", part(f"{PROJ}.qzeros", lambda z: z[:, :5]), "qzeros has 5 words a group"),
    "gptq: weights of bytes": (
        "gptq",
        part(f"{PROJ}.qweight", lambda q: q.astype(np.int8)),
        "qweight is stored as I8, which this format does not have",
    ),
    "gptq: nan": ("gptq", part(f"{PROJ}.scales", lambda s: s * np.float16(np.nan)), "holds NaN or infinity"),
    "gptq: infinity": ("gptq", part(f"{PROJ}.scales", lambda s: s + np.float16(np.inf)), "holds NaN or infinity"),
    "gptq: empty": ("gptq", part(f"{PROJ}.scales", lambda s: s[:0]), r"scales has the shape \[0, 64\]"),
    "gptq: a vector": ("gptq", part(f"{PROJ}.qweight", np.ravel), r"qweight has the shape \[512\]"),
    "gptq: another matrix": (
        "gptq",
        lambda config, stored: stored.update(
            {f"{PROJ}.{end}": stored[f"model.layers.0.self_attn.o_proj.{end}"] for end in ("qweight", "g_idx")}
        ),
        "k_proj.weight has shape|qzeros has|has 128 columns|g_idx names|scales has",
    ),
    "gptq: bits in words": ("gptq", entry(bits="4"), "GPTQ's bits are '4', not a number"),
    "gptq: 5 bits": ("gptq", entry(bits=5), r"quantized already \(GPTQ, 5 bits\), which npqwen does not read"),
    "gptq: marlin": ("gptq", entry(checkpoint_format="marlin"), r"\(GPTQ, marlin\)"),
    "gptq: bitblas of transformers 5": ("gptq", entry(checkpoint_format=None, format="bitblas"), r"\(GPTQ, bitblas\)"),
    "gptq: old marlin": ("gptq", entry(is_marlin_format=True), r"\(GPTQ, marlin\)"),
    "gptq: no group size": ("gptq", entry(group_size=0), "group_size is 0, not the number of columns of a group"),
    "gptq: absurd group size": ("gptq", entry(group_size=10**30), "group_size is 10000.*, not the number of columns"),
    "awq: another group size": ("awq", entry(group_size=32), r"scales has shape \[4, 64\], .* need \[2, 64\]"),
    "awq: gemv": ("awq", entry(version="gemv"), r"\(AWQ, gemv\)"),
    "awq: gemv of transformers 5": ("awq", entry(version=None, format="gemv"), r"\(AWQ, gemv\)"),
    "awq: llm-awq": ("awq", entry(backend="llm-awq"), r"\(AWQ, llm-awq\)"),
    "awq: 8 bits": ("awq", entry(bits=8), r"\(AWQ, 8 bits\)"),
    "awq: negative group size": ("awq", entry(group_size=-2), "group_size is -2, not the number"),
    "awq: no zeros": ("awq", without(f"{PROJ}.qzeros"), f"no {PROJ}.qzeros, though"),
    "pack: no shape": ("pack", without(f"{PROJ}.weight_shape"), f"no {PROJ}.weight_shape, though"),
    "pack: other shape": (
        "pack",
        part(f"{PROJ}.weight_shape", lambda s: s * 2),
        "weight_shape is 128 x 128, which does not fit weight_packed",
    ),
    "pack: negative shape": ("pack", part(f"{PROJ}.weight_shape", lambda s: -s), "weight_shape is -64 x -64"),
    "pack: huge shape": ("pack", part(f"{PROJ}.weight_shape", lambda s: s + 2**62), "which does not fit weight_packed"),
    "pack: groups that do not divide": (
        "pack",
        part(f"{PROJ}.weight_scale", lambda s: s[:, :3]),
        "weight_scale has 3 groups, which do not fit 64 columns",
    ),
    "pack: fewer zeros": (
        "pack",
        part(f"{PROJ}.weight_zero_point", lambda z: z[:-1]),
        r"weight_zero_point has shape \[7, 4\], but other parts of the layer need \[8, 4\]",
    ),
    "pack: a group too many": (
        "pack",
        part(f"{PROJ}.weight_g_idx", lambda g: g + 1),
        "g_idx names a group that is not",
    ),
    "pack: other bits": ("pack", weights(num_bits=8), "weight_shape is 64 x 64, which does not fit weight_packed"),
    "pack: bits in words": ("pack", weights(num_bits="4"), "num_bits is '4'; npqwen reads 2 to 8"),
    "pack: no bits": ("pack", weights(num_bits=0), "num_bits is 0; npqwen reads 2 to 8"),
    "pack: mxfp6": ("pack", entry(format="mxfp6-pack-quantized"), r"\(compressed-tensors, mxfp6-pack-quantized\)"),
    "pack: sparse": ("pack", entry(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "pack: transforms": ("pack", entry(transform_config={"config_groups": {}}), "compressed-tensors with transforms"),
    "pack: no groups": ("pack", entry(config_groups=None), "config_groups is None, not an object"),
    "pack: many groups": ("pack", entry(config_groups=dict.fromkeys(map(str, range(101)))), "has 101 groups"),
    "pack: a group of nothing": ("pack", entry(config_groups={"x": 3}), "config_groups has 3, which is not a group"),
    "int8: no scales": ("int8", without(f"{PROJ}.weight_scale"), f"no {PROJ}.weight_scale, though"),
    "int8: scales of fewer rows": (
        "int8",
        part(f"{PROJ}.weight_scale", lambda s: s[:-1]),
        "the scales of .* have shape",
    ),
    "int8: zeros of another shape": (
        "int8",
        part(f"{PROJ}.weight_zero_point", lambda z: z[:-1]),
        r"the zero points of .* are I8 of shape \[63, 1\]; they must be",
    ),
    "int8: zeros in float": (
        "int8",
        part(f"{PROJ}.weight_zero_point", lambda z: z.astype(np.float32)),
        "the zero points of .* are F32 of shape",
    ),
    "int8: blocks of nothing": ("int8", weights(block_structure=[0, 8]), r"block_structure is \[0, 8\], not the rows"),
    "mlx: no biases": ("mlx", without(f"{PROJ}.biases"), f"no {PROJ}.biases, though"),
    "mlx: scales of fewer rows": ("mlx", part(f"{PROJ}.biases", lambda b: b[1:]), r"biases has shape \[63, 4\]"),
    "mlx: other group size": ("mlx", of_mlx(group_size=32), "4 groups of 32 integers of 4 bits do not fit"),
    "mlx: group size of nothing": ("mlx", of_mlx(group_size=0), "group_size is 0, not the number of columns"),
    "mlx: mode": ("mlx", of_mlx(mode="nvfp6"), r"\(MLX, nvfp6\)"),
    "mlx: mode of a layer": ("mlx", of_mlx(**{PROJ: {"mode": ["mxfp4"]}}), r"\(MLX, \['mxfp4'\]\)"),
    "mlx: floats with scales of floats": (
        "mlx",
        of_mlx(**{PROJ: {"mode": "mxfp4"}}),
        f"{PROJ}.scales is stored as BF16, which this format does not have",
    ),
    "nvfp4: no scale of the matrix": (
        "nvfp4",
        without(f"{PROJ}.weight_global_scale"),
        f"no {PROJ}.weight_global_scale, though",
    ),
    "nvfp4: scales of the matrix": (
        "nvfp4",
        part(f"{PROJ}.weight_global_scale", lambda s: np.repeat(s, 2)),
        r"weight_global_scale has the shape \[2\], not that of one number",
    ),
    "nvfp4: a scale of zero": (
        "nvfp4",
        part(f"{PROJ}.weight_global_scale", np.zeros_like),
        "weight_global_scale is 0, not a positive number",
    ),
    "nvfp4: an infinite scale": (
        "nvfp4",
        part(f"{PROJ}.weight_global_scale", lambda s: s * np.inf),
        "weight_global_scale is inf, not a positive number",
    ),
    "nvfp4: one group": (
        "nvfp4",
        part(f"{PROJ}.weight_scale", lambda s: s[:, :1]),
        "weight_scale has 1 groups for 64 columns; each must have 16 or 32",
    ),
    "nvfp4: scales of fewer rows": (
        "nvfp4",
        part(f"{PROJ}.weight_scale", lambda s: s[1:]),
        r"weight_scale has shape \[63, 4\], but other parts of the layer need \[64, 4\]",
    ),
    "nvfp4: groups that do not divide": (
        "nvfp4",
        part(f"{PROJ}.weight_scale", lambda s: s[:, :3]),
        "weight_scale has 3 groups for 64 columns; each must have 16 or 32",
    ),
    "nvfp4: scales of integers": (
        "nvfp4",
        part(f"{PROJ}.weight_scale", lambda s: s.astype(np.int8)),
        "weight_scale is stored as I8, which this format does not have",
    ),
    "nvfp4: no packed weights": ("nvfp4", without(f"{PROJ}.weight_packed"), f"no {PROJ}.weight_packed, though"),
    "modelopt: awq of int4": ("modelopt", entry(quant_algo="INT4_AWQ"), r"\(ModelOpt, INT4_AWQ\)"),
    "modelopt: scaled activations": (
        "modelopt",
        entry(quant_algo="NVFP4_AWQ", pre_quant_scale=True),
        r"\(ModelOpt, NVFP4_AWQ, with scaled activations\)",
    ),
    "modelopt: a product of low rank": (
        "modelopt",
        entry(config_groups={"group_0": {"lora_rank": 32}}),
        r"\(ModelOpt, NVFP4, with scaled activations\)",
    ),
    "modelopt: no algorithm": ("modelopt", entry(quant_algo=None), "quant_algo is None, not the name of an algorithm"),
    "modelopt: layers of nothing": (
        "modelopt",
        entry(quant_algo="MIXED_PRECISION", quantized_layers=[1]),
        r"quantized_layers is \[1\], not an object of layers",
    ),
    "modelopt: another algorithm of a layer": (
        "modelopt",
        entry(quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}),
        r"\(ModelOpt, W8A8_SQ_PER_CHANNEL\)",
    ),
    "modelopt: no scale of the matrix": ("modelopt", without(f"{PROJ}.weight_scale_2"), "no .*weight_scale_2, though"),
    "modelopt: no scales": ("modelopt", without(f"{PROJ}.weight_scale"), "no .*weight_scale, though"),
    "modelopt: activations that are scaled": (
        "modelopt",
        lambda config, stored: stored.update({f"{PROJ}.pre_quant_scale": np.ones(64, np.float32)}),
        "pre_quant_scale is of an algorithm that npqwen does not read",
    ),
    "mxfp8: a scale that is not a number": (
        "mxfp8",
        part(f"{PROJ}.weight_scale", lambda s: np.full(s.shape, 255, np.uint8).view("V1")),
        "holds NaN or infinity",
    ),
    "bnb: another type": ("bnb", entry(bnb_4bit_quant_type="int4"), r"\(bitsandbytes, int4\)"),
    "bnb: no description": ("bnb", without(f"{PROJ}.{STATE}"), f"quant_map has no {STATE} beside it"),
    "bnb: a description of nothing": ("bnb", part(f"{PROJ}.{STATE}", lambda s: s[1:]), "is not a JSON object"),
    "bnb: another shape": ("bnb", described(shape=[64, 32]), r"which the shape \[64, 32\] does not fit"),
    "bnb: a shape of thousands of digits": ("bnb", described(shape=[10**4000, 1]), "does not fit"),
    "bnb: a shape in words": ("bnb", described(shape="64"), "has the shape '64', not rows and columns"),
    "bnb: a block of nothing": ("bnb", described(blocksize=0), "has the blocksize 0, not a number of weights"),
    "bnb: another block size": ("bnb", described(blocksize=32), r"absmax has shape \[64\], .* need \[128\]"),
    "bnb: no offset": ("bnb", described(nested_offset=None), "has the nested_offset None, not a number"),
    "bnb: no values": ("bnb", without(f"{PROJ}.weight.quant_map"), "no .*weight.quant_map, though"),
    "bnb: fewer values": (
        "bnb",
        part(f"{PROJ}.weight.quant_map", lambda m: m[1:]),
        r"weight.quant_map has shape \[15\], but other parts of the layer need \[16\]",
    ),
    "bnb: nan": ("bnb", part(f"{PROJ}.weight.nested_absmax", lambda s: s * np.nan), "holds NaN or infinity"),
    "bnb8: another order": (
        "bnb8",
        part(f"{PROJ}.weight_format", lambda f: np.full(f.shape, 2, np.uint8).view("V1")),
        "weight_format is not 0: the matrix is not stored by rows",
    ),
    "bnb8: no scales": ("bnb8", without(f"{PROJ}.SCB"), f"no {PROJ}.SCB, though"),
    "bnb8: fewer scales": ("bnb8", part(f"{PROJ}.SCB", lambda s: s[1:]), r"SCB has shape \[63\], .* need \[64\]"),
    "autoround: rotated": ("autoround", entry(rotation_config={"hadamard_type": "x"}), r"\(AutoRound, rotated\)"),
    "autoround: another packing": ("autoround", entry(packing_format="marlin"), r"\(AutoRound, int, marlin\)"),
    "autoround: bits in words": ("autoround", entry(bits="4"), "AutoRound's bits are '4'; npqwen reads 2 to 8"),
    "autoround: other groups": ("autoround", entry(group_size=32), "scales has 4 groups; 64 columns have 2"),
    "autoround: layers of nothing": ("autoround", entry(extra_config=[1]), r"extra_config is \[1\], not an object"),
    "autoround: a group of nothing": (
        "autoround",
        entry(extra_config={"x": {"group_size": -7}}),
        "group_size is -7, not the number of columns",
    ),
    "mlx: 7 bits": ("mlx", of_mlx(bits=7), r"\(MLX, 7 bits\)"),
    "mlx: bits in words": ("mlx", of_mlx(bits=[4]), r"MLX's bits are \[4\], not a number"),
    "mlx: fewer experts": ("mlx", part(f"{UP}.weight", lambda w: w[:3]), "config.json has 4 experts"),
    "mlx: experts without a model of them": (
        "mlx",
        lambda config, stored: config.update(model_type="qwen3"),
        "experts that config.json does not describe",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    form, edit, message = REFUSED[case]
    config, stored = made(form)
    edit(config, stored)
    write(tmp_path / "in", config, stored)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out", 4, threads=1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert os.listdir(tmp_path) == ["in"]


def test_a_huge_block_takes_no_memory(tmp_path: Path) -> None:
    """A block of more weights than the matrix has is all of it."""
    config, stored = made("bnb")
    described(blocksize=2**31 - 1)(config, stored)
    for kind in ("absmax", "nested_absmax"):
        stored[f"{PROJ}.weight.{kind}"] = stored[f"{PROJ}.weight.{kind}"][:1]
    write(tmp_path, config, stored)
    tensor = Checkpoint(tmp_path).tensors[f"{PROJ}.weight"]
    tracemalloc.start()
    try:
        tensor.floats(3, 5)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_method_without_a_name(tmp_path: Path) -> None:
    config, stored = made("gptq")
    del config["quantization_config"]["quant_method"], config["quantization_config"]["bits"]
    write(tmp_path, config, stored)
    with pytest.raises(CheckpointError, match=r"quantized already \(by an unknown method\)"):
        Checkpoint(tmp_path)


VALUES = [None, True, -1, 0, 1, 3, 4, 8, 10**9, 10**30, 1.5, "x", "4", "gptq_v2", [], [0], [1, 2], {}, {"bits": 3}]


def mutations(config: dict[str, Any], stored: Stored, rng: np.random.Generator) -> Iterator[str]:
    """Change something, over and over; yields what."""
    key = "quantization" if "quantization" in config else "quantization_config"
    whole_config, whole = copy.deepcopy(config), dict(stored)
    names = [name for name in stored if name.startswith(PROJ) or "experts.1.up_proj" in name or UP in name]
    while True:
        config.update(copy.deepcopy(whole_config))
        stored.clear()
        stored.update(whole)
        if rng.integers(3) == 0:
            place = config[key]
            while True:
                one = list(place)[rng.integers(len(place))]
                if not isinstance(place[one], dict) or not place[one] or rng.integers(4) == 0:
                    break
                place = place[one]
            place[one] = VALUES[rng.integers(len(VALUES))]
            yield f"{one} = {place[one]!r}"
            continue
        name = names[rng.integers(len(names))]
        values = stored[name]
        if values.ndim == 0:
            values = values[None]
        kind = int(rng.integers(9))
        if kind == 0:
            del stored[name]
        elif kind == 1:
            stored[name] = values[rng.integers(len(values)) :]
        elif kind == 2:
            stored[name] = np.ascontiguousarray(values.T)
        elif kind == 3:
            stored[name] = np.resize(values, rng.integers(0, 80, values.ndim))
        elif kind == 4:
            dtypes = (np.int8, np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.float16, np.float32)
            stored[name] = (
                values.view(np.uint8).ravel()[: values.size].reshape(values.shape).astype(dtypes[rng.integers(8)])
            )
        elif kind == 5:
            stored[name] = rng.integers(0, 256, values.nbytes, np.uint8).view(values.dtype).reshape(values.shape)
        elif kind == 6:
            stored[name] = values.reshape(-1)
        elif kind == 7:
            stored[name] = values[None]
        else:
            other = names[rng.integers(len(names))]
            stored[name], stored[other] = stored[other], values
        yield f"{name}: {kind}"


@pytest.mark.parametrize("form", ENTRIES)
def test_mutations_are_read_or_refused_in_one_line(tmp_path: Path, form: str) -> None:
    config, stored = made(form)
    write(tmp_path, config, stored)
    read_all(tmp_path)
    refused: list[tuple[str, str]] = []
    for _, what in zip(range(60), mutations(config, stored, np.random.default_rng(1)), strict=False):
        write(tmp_path, config, stored)
        try:
            read_all(tmp_path)
        except CheckpointError as error:
            refused.append((what, str(error)))
        except Exception as error:
            raise AssertionError(what) from error
    assert not [one for one in refused if "\n" in one[1] or len(one[1]) > 600]
    assert 30 < len(refused) < 60
