"""Checkpoints that are quantized already, made by hand from the definition of each format, with what they mean.

A quantizer takes a matrix and gives the parts that are stored in its place, by the ends of their names, and the float32
weights that these mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY, decode, encode, from_bf16, to_bf16, write_checkpoint

Quantizer = Callable[[np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]]
UNQUANTIZED = ("embed_tokens", "lm_head", "mlp.gate.")
MOE = Path(__file__).parent / "data" / "tiny-qwen3-moe"


def e4m3(code: int) -> float:
    """The value of a byte of float8 e4m3fn (Micikevicius et al. 2022), digit by digit."""
    bits = f"{code:08b}"
    sign, exponent, mantissa = 1 - 2 * int(bits[0]), int(bits[1:5], 2), int(bits[5:], 2)
    if bits[1:] == "1111111":
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """The codes (uint8) of the nearest values."""
    order = np.argsort(E4M3[:127])
    rising = E4M3[:127][order]
    middles = (rising[1:] + rising[:-1]) / 2
    codes: np.ndarray = order[np.searchsorted(middles, np.abs(values))]
    return np.where(values < 0, codes + 128, codes).astype(np.uint8)


def fp8(weights: np.ndarray, block: tuple[int, int] = (128, 128), bf16: bool = False) -> Any:
    """Fine-grained FP8. bf16: of the scales."""
    rows, columns = weights.shape
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    codes, meant = np.zeros(weights.shape, np.uint8), np.zeros(weights.shape, np.float32)
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = np.abs(weights[part]).max(initial=1e-9) / np.float32(448)
            scales[i, j] = from_bf16(to_bf16(scale)).item() if bf16 else scale
            codes[part] = to_e4m3(weights[part] / scales[i, j])
            meant[part] = E4M3[codes[part]] * scales[i, j]
    return {"weight": codes, "weight_scale_inv": to_bf16(scales) if bf16 else scales}, meant


def scaled_fp8(weights: np.ndarray, block: tuple[int, int]) -> Any:
    """compressed-tensors' float-quantized, with a scale for each block."""
    parts, meant = fp8(weights, block, bf16=True)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, meant


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers (rows, n), each row as a stream of bits from the lowest bit of its first word on: int32 words."""
    stream = (values[:, :, None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8).reshape(len(values), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, 1, bitorder="little").view("<i4")


def affine(
    weights: np.ndarray, bits: int, groups: np.ndarray, dtype: str = "F16"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers 0 to 2^bits - 1, scales and integer zeros (rows, number of groups) of weights whose columns belong to
    groups.
    """
    count = int(groups.max()) + 1
    most = (1 << bits) - 1
    scales, zeros = np.zeros((len(weights), count), np.float32), np.zeros((len(weights), count), np.int64)
    for g in range(count):
        of_group = weights[:, groups == g]
        low, high = np.minimum(of_group.min(1), 0), np.maximum(of_group.max(1), 1e-6)
        scales[:, g] = decode(encode((high - low) / most, dtype))
        zeros[:, g] = np.clip(np.rint(-low / scales[:, g]), 0, most)
    integers = np.clip(np.rint(weights / scales[:, groups]) + zeros[:, groups], 0, most)
    return integers.astype(np.int64), scales, zeros


def gptq(
    weights: np.ndarray, bits: int = 4, group: int = 16, act_order: bool = False, version: int = 1, index: bool = True
) -> Any:
    """GPTQ, v1 or v2. act_order: groups in no order. index: store g_idx."""
    columns = weights.shape[1]
    groups = np.arange(columns) // (columns if group == -1 else group)
    if act_order:
        groups = np.random.default_rng(columns).permutation(groups)
    integers, scales, zeros = affine(weights, bits, groups)
    stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
    parts = {
        "qweight": np.ascontiguousarray(packed(integers, bits).T),
        "qzeros": packed(stored.T, bits),
        "scales": encode(np.ascontiguousarray(scales.T), "F16"),
    }
    if index:
        parts["g_idx"] = groups.astype(np.int32)
    return parts, (integers - zeros[:, groups]).astype(np.float32) * scales[:, groups]


def awq(weights: np.ndarray, group: int = 16) -> Any:
    """AWQ, version gemm: each word has 8 rows in the order that AutoAWQ packs them in."""
    groups = np.arange(weights.shape[1]) // (weights.shape[1] if group == -1 else group)
    integers, scales, zeros = affine(weights, 4, groups)

    def words(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for nibble, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= values[:, row::8].astype(np.uint32) << np.uint32(4 * nibble)
        return out.view(np.int32)

    parts = {"qweight": words(integers.T), "qzeros": words(zeros.T), "scales": encode(scales.T.copy(), "F16")}
    return parts, (integers - zeros[:, groups]).astype(np.float32) * scales[:, groups]


def pack_quantized(
    weights: np.ndarray,
    bits: int = 4,
    group: int = -1,
    symmetric: bool = True,
    act_order: bool = False,
    int8_zeros: bool = False,
) -> Any:
    """compressed-tensors' pack-quantized. int8_zeros: zero points as older versions stored them."""
    columns = weights.shape[1]
    groups = np.arange(columns) // (columns if group == -1 else group)
    if act_order:
        groups = np.random.default_rng(columns).permutation(groups)
    parts = {}
    integers, scales, zeros = affine(weights, bits, groups, "BF16")
    if symmetric:
        zeros = np.full_like(zeros, 1 << bits - 1)
        integers = np.clip(np.rint(weights / scales[:, groups]) + zeros[:, groups], 0, (1 << bits) - 1).astype(int)
    else:
        signed = (zeros - (1 << bits - 1)).astype(np.int8)
        parts["weight_zero_point"] = signed if int8_zeros else np.ascontiguousarray(packed(zeros.T, bits).T)
    if act_order:
        parts["weight_g_idx"] = groups.astype(np.int32)
    parts |= {
        "weight_packed": packed(integers, bits),
        "weight_scale": to_bf16(scales),
        "weight_shape": np.array(weights.shape, np.int64),
    }
    return parts, (integers - zeros[:, groups]).astype(np.float32) * scales[:, groups]


def int_quantized(weights: np.ndarray, groups: int = 1, symmetric: bool = True, matrix: bool = False) -> Any:
    """compressed-tensors' int-quantized: int8 with a scale for each row, or some for a row, or one for the matrix."""
    of_column = np.arange(weights.shape[1]) * groups // weights.shape[1]
    integers, scales, zeros = affine(weights, 8, of_column, "BF16")
    if matrix:
        scales[:], zeros[:] = scales.max(), 128
    if symmetric:
        zeros[:] = 128
    integers = np.clip(np.rint(weights / scales[:, of_column]) + zeros[:, of_column], 0, 255) - 128
    zeros -= 128
    shape = (1,) if matrix else scales.shape
    stored = scales.ravel()[: math.prod(shape)].reshape(shape)
    parts = {"weight": integers.astype(np.int8), "weight_scale": to_bf16(stored)}
    if not symmetric:
        parts["weight_zero_point"] = zeros.astype(np.int8)
    return parts, (integers - zeros[:, of_column]).astype(np.float32) * scales[:, of_column]


def mlx(weights: np.ndarray, bits: int = 4, group: int = 8, dtype: str = "BF16") -> Any:
    """MLX, affine: W = q * scale + bias, in float32."""
    groups = np.arange(weights.shape[1]) // group
    integers, scales, zeros = affine(weights, bits, groups, dtype)
    biases = decode(encode(-scales * zeros, dtype))
    parts = {"weight": packed(integers, bits).view(np.uint32), "scales": encode(scales, dtype)}
    parts["biases"] = encode(biases, dtype)
    return parts, integers.astype(np.float32) * scales[:, groups] + biases[:, groups]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def to_e2m1(values: np.ndarray) -> np.ndarray:
    """The codes (0 to 15) of values of e2m1 near these."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    codes: np.ndarray = np.searchsorted(middles, np.abs(values)) + 8 * (values < 0)
    return codes


def from_e2m1(codes: np.ndarray) -> np.ndarray:
    values: np.ndarray = np.where(codes < 8, 1, -1).astype(np.float32) * E2M1[codes % 8]
    return values


def in_pairs(codes: np.ndarray, high_first: bool = False) -> np.ndarray:
    """Two codes in a byte, the first in its low half, or in its high one; of void, which write_safetensors stores as
    U8."""
    first, second = codes[..., ::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    return (first << 4 | second if high_first else first | second << 4).view("V1")


def nvfp4(weights: np.ndarray, group: int = 16, divides: bool = True) -> Any:
    """compressed-tensors' NVFP4, whose global scale divides the others, or ModelOpt's, whose multiplies them."""
    grouped = weights.reshape(len(weights), -1, group)
    factor = np.float32(448 * 6) / np.abs(weights).max() if divides else np.abs(weights).max() / np.float32(448 * 6)
    codes = to_e4m3(np.abs(grouped).max(2) / 6 * (factor if divides else 1 / factor))
    scales = E4M3[codes] / factor if divides else E4M3[codes] * factor
    values = to_e2m1(grouped / np.maximum(scales, 1e-9)[:, :, None])
    packed_values = in_pairs(values.reshape(weights.shape))
    if divides:
        overall = np.array([factor], np.float32)
        parts = {"weight_packed": packed_values, "weight_scale": codes, "weight_global_scale": overall}
    else:
        parts = {"weight": packed_values, "weight_scale": codes, "weight_scale_2": np.array(factor, np.float32)}
    parts["input_global_scale" if divides else "input_scale"] = np.ones(1, np.float32)
    return parts, (from_e2m1(values) * scales[:, :, None]).reshape(weights.shape)


def microscaled(weights: np.ndarray, bits: int = 4, weight: str = "weight_packed", words: bool = False) -> Any:
    """MXFP4 or MXFP8. weight: the name of the part. words: as MLX stores it."""
    grouped = weights.reshape(len(weights), -1, 32)
    exponents = np.floor(np.log2(np.abs(grouped).max(2))).astype(int) - (2 if bits == 4 else 8)
    scales = np.exp2(exponents.astype(np.float32))[:, :, None]
    codes = to_e2m1(grouped / scales) if bits == 4 else to_e4m3(grouped / scales)
    meant = (from_e2m1(codes) if bits == 4 else E4M3[codes]) * scales
    codes = codes.reshape(weights.shape)
    stored = in_pairs(codes) if bits == 4 else codes.astype(np.uint8)
    parts = {weight: np.ascontiguousarray(stored).view("<u4") if words else stored}
    parts["scales" if words else "weight_scale"] = (exponents + 127).astype(np.uint8).view("V1")
    return parts, meant.reshape(weights.shape)


def bitsandbytes(weights: np.ndarray, block: int = 64, double: bool = False, offset: float = 0.05) -> Any:
    """4 bits of bitsandbytes, with 16 values of our own; double: with scales in bytes."""
    values = np.sort(np.random.default_rng(0).uniform(-1, 1, 16)).astype(np.float32)
    flat = np.pad(weights.ravel(), (0, -weights.size % block)).reshape(-1, block)
    scales = np.abs(flat).max(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": weights.shape}
    parts: dict[str, np.ndarray] = {"weight.quant_map": values, "weight.absmax": scales}
    if double:
        table = np.linspace(-1, 1, 256).astype(np.float32)
        centred = np.pad(scales - np.float32(offset), (0, -len(scales) % 4)).reshape(-1, 4)
        peaks = np.maximum(np.abs(centred).max(1), np.float32(1e-6))
        codes = np.abs(centred[:, :, None] / peaks[:, None, None] - table).argmin(2)
        scales = (table[codes] * peaks[:, None] + np.float32(offset)).ravel()[: len(scales)]
        parts |= {"weight.absmax": codes.ravel()[: len(scales)].astype(np.uint8).view("V1")}
        parts |= {"weight.nested_quant_map": table, "weight.nested_absmax": peaks}
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": float(np.float32(offset))}
    codes = np.abs(flat[:, :, None] / np.maximum(scales, 1e-9)[:, None, None] - values).argmin(2)
    meant = (values[codes] * scales[:, None]).ravel()[: weights.size].reshape(weights.shape)
    stream = codes.ravel()[: weights.size]
    parts["weight"] = in_pairs(np.pad(stream, (0, weights.size % 2)), high_first=True)[:, None]
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8).view("V1")
    return parts, meant


def bitsandbytes_int8(weights: np.ndarray) -> Any:
    """LLM.int8()."""
    peaks = np.abs(weights).max(1)
    integers = np.rint(weights / peaks[:, None] * 127).astype(np.int8)
    parts = {"weight": integers, "SCB": peaks, "weight_format": np.zeros((), np.uint8).view("V1")}
    return parts, integers.astype(np.float32) * peaks[:, None] * np.float32(1 / 127)


def write_quantized(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantizer: Quantizer,
    *,
    plain: tuple[str, ...] = UNQUANTIZED,
    rename: Callable[[str], str] = str,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Write a checkpoint with its matrices quantized, and return what its tensors mean.

    plain: parts of the names of matrices that stay BF16. rename: makes the names in the files. options: of
    write_checkpoint.
    """
    stored: dict[str, np.ndarray] = {}
    meant = {}
    for name, values in tensors.items():
        if values.ndim == 1 or any(part in name for part in plain):
            stored[rename(name)], meant[name] = to_bf16(values), from_bf16(to_bf16(values))
            continue
        parts, meant[name] = quantizer(values)
        stored |= {rename(name).removesuffix("weight") + end: part for end, part in parts.items()}
    write_checkpoint(directory, config, stored, dtype="F32", **options)
    return meant


def example(source: Path = TINY) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of the example model, or of the trained mixture (MOE)."""
    from reference import read_safetensors

    weights = {}
    for name, values in read_safetensors(source / "model.safetensors").items():
        weights[name] = np.asarray(values, np.float32)
    return json.loads((source / "config.json").read_text()), weights


def check_tensors(directory: Path, meant: Mapping[str, np.ndarray]) -> None:
    """Every tensor of a checkpoint, read in parts, is what it means."""
    from npqwen_quant.checkpoint import Checkpoint

    tensors = Checkpoint(directory).tensors
    assert tensors.keys() == meant.keys()
    for name, values in meant.items():
        assert tensors[name].shape == values.shape
        for first, last in ((0, 1), (1, 18), (18, len(values)), (0, len(values))):
            count = min(last, len(values)) - first
            if count > 0:
                np.testing.assert_array_equal(tensors[name].floats(first, count), values[first : first + count])
        assert tensors[name].nbytes > 0


def check_conversion(source: Path, out: Path, meant: Mapping[str, np.ndarray]) -> None:
    """Converted to 16 bits, a checkpoint gives the logits of what its tensors mean, rounded to bf16."""
    from npqwen_quant import convert
    from reference import ReferenceModel

    import npqwen
    from npqwen.format.config import Config

    convert(source, out, bits=16)
    ids = np.random.default_rng(0).integers(0, 4096, 40)
    rounded = {name: from_bf16(to_bf16(values)) for name, values in meant.items()}
    want = ReferenceModel(Config.from_directory(out), rounded).logits(ids)
    with npqwen.load(out, threads=1) as model:
        np.testing.assert_allclose(model.logits(ids), want, rtol=0, atol=1e-3 * np.abs(want).max())
