#!/usr/bin/env python3
"""Write matrices that other libraries quantized, and what those libraries make of them again.

    python -m pip install torch transformers compressed-tensors 'mlx[cpu]' gptqmodel
    python -m pip install bitsandbytes auto-round nvidia-modelopt
    python -m pip download --no-deps autoawq && tar xzf autoawq-*.tar.gz
    PYTHONPATH=autoawq-... python tests/data/make_quantized.py [quantized|quantized_floats]

quantized.npz has integers and FP8, quantized_floats.npz floats of 4 and 8 bits, bitsandbytes and AutoRound: for each
case, `case/part` for every part that a checkpoint stores, and `case/meant`, the library's float32 weights. bf16 arrays
are kept as their bits, uint16; e4m3 as uint8. `e4m3`: PyTorch's values of all bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROWS, COLUMNS, GROUP = 32, 64, 32


def main() -> None:
    import torch

    e4m3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    files = {
        "quantized": ({"e4m3": e4m3}, (fp8, gptq, awq, compressed_tensors, mlx)),
        "quantized_floats": ({}, (compressed_floats, mlx_floats, modelopt, bitsandbytes, autoround)),
    }
    for name in sys.argv[1:] or files:
        torch.manual_seed(0)
        arrays, makers = files[name]
        for make in makers:
            for case, (parts, meant) in make(torch.randn(ROWS, COLUMNS) / 8).items():
                arrays |= {f"{case}/{part}": stored(tensor) for part, tensor in parts.items()}
                arrays[f"{case}/meant"] = np.asarray(meant, np.float32)
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


def stored(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch as an array; an array as it is."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
        return np.asarray(tensor.numpy()).view(np.uint16)
    return np.asarray((tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).numpy())


def fp8(weights: Any) -> dict[str, Any]:
    """transformers' fine-grained FP8."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[8, 16], scale_fmt=None))
    parts = Fp8Quantize(quantizer).convert({"layer.weight": weights})
    parts = {name.removeprefix("layer."): part for name, part in parts.items()}
    meant = Fp8Dequantize(quantizer)._dequantize_one(parts["weight"], parts["weight_scale_inv"])
    return {"fp8": (parts, meant)}


def gptq(weights: Any) -> dict[str, Any]:
    """GPTQModel's packing of integers, with groups in order and in none; v1 is made from v2 as it makes it."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model_dequant import _revert_gptq_v1_qzeros_correction

    found = {}
    for bits in (2, 3, 4, 8):
        for order in ("", "-act-order"):
            most = (1 << bits) - 1
            groups = torch.arange(COLUMNS) // GROUP
            if order:
                groups = groups[torch.randperm(COLUMNS)]
            scales, zeros = torch.zeros(ROWS, 2), torch.zeros(ROWS, 2)
            for g in range(2):
                of_group = weights[:, groups == g]
                low, high = of_group.min(1).values, of_group.max(1).values
                scales[:, g] = ((high - low) / most).half().float()
                zeros[:, g] = (-low / scales[:, g]).round().clamp(0, most)
            linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            linear.weight.data = weights.clone()
            module = TorchLinear(bits, GROUP, False, bool(order), COLUMNS, ROWS)
            module.pack_original(linear, scales, zeros, groups.to(torch.int32))
            parts = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
            module.scales = module.scales.float()
            module.post_init()
            meant = module.dequantize_weight().T
            old = parts | {"qzeros": _revert_gptq_v1_qzeros_correction(parts["qzeros"], bits)}
            found[f"gptq_v2-{bits}{order}"] = parts, meant
            found[f"gptq-{bits}{order}"] = old, meant
    return found


def awq(weights: Any) -> dict[str, Any]:
    """AutoAWQ's GEMM. Its package does not import with recent transformers, these two modules do."""
    import torch

    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        place = next(Path(path, *name.split(".")) for path in sys.path if Path(path, "awq").is_dir())
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(place)]
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    grouped = weights.reshape(ROWS, -1, GROUP)
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    integers = (grouped / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 15)
    linear.weight.data = ((integers - zeros[:, :, None]) * scales[:, :, None]).reshape(ROWS, COLUMNS)
    made = WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scales.T.contiguous(), zeros.T.contiguous())
    parts = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales")}
    meant = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, GROUP).T
    return {"awq": (parts, meant)}


def compressed_tensors(weights: Any) -> dict[str, Any]:
    """Packed and naive, symmetric and not, with scales of rows, groups, blocks and the matrix."""
    import torch
    from compressed_tensors.compressors import NaiveQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    packs: list[tuple[str, Any, dict[str, Any]]] = [
        (f"{bits}-{strategy}{'' if symmetric else '-zeros'}", PackedQuantizationCompressor,
         {"num_bits": bits, "strategy": strategy, "symmetric": symmetric})
        for bits in (3, 4, 8) for strategy in ("group", "channel") for symmetric in (True, False)
    ]  # fmt: skip
    naive: list[tuple[str, Any, dict[str, Any]]] = [
        ("int-channel", NaiveQuantizationCompressor, {"num_bits": 8, "strategy": "channel"}),
        ("int-zeros", NaiveQuantizationCompressor, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("int-tensor", NaiveQuantizationCompressor, {"num_bits": 8, "strategy": "tensor"}),
        ("float-channel", NaiveQuantizationCompressor, {"num_bits": 8, "strategy": "channel", "type": "float"}),
        ("float-tensor", NaiveQuantizationCompressor, {"num_bits": 8, "strategy": "tensor", "type": "float"}),
        ("float-block", NaiveQuantizationCompressor,
         {"num_bits": 8, "strategy": "block", "type": "float", "block_structure": [24, 40]}),
    ]  # fmt: skip
    found = {}
    for case, compressor, options in packs + naive:
        args = QuantizationArgs(**options, **({"group_size": GROUP} if options["strategy"] == "group" else {}))
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        parted = {
            "group": lambda: weights.reshape(ROWS, -1, GROUP),
            "channel": lambda: weights.reshape(ROWS, 1, -1),
            "tensor": lambda: weights.reshape(1, 1, -1),
            "block": lambda: torch.nn.functional.pad(weights, (0, 16, 0, 16)).reshape(2, 24, 2, 40).transpose(1, 2)
            .reshape(2, 2, -1),
        }[options["strategy"]]()  # fmt: skip
        scale, zero = calculate_qparams(parted.amin(-1), parted.amax(-1), args)
        if options["strategy"] == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        scale = scale.bfloat16()
        parts = compressor.compress({"weight": weights, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        wide = {**parts, "weight_scale": scale.float()}
        if "weight_zero_point" not in wide:
            wide["weight_zero_point"] = None
        found[f"compressed-{case}"] = parts, compressor.decompress(wide, scheme)["weight"]
    return found


def mlx(weights: Any) -> dict[str, Any]:
    """Affine, with scales in bf16."""
    import mlx.core as mx

    found = {}
    for bits in (2, 3, 4, 5, 6, 8):
        parts = mx.quantize(mx.array(weights.numpy()).astype(mx.bfloat16), group_size=GROUP, bits=bits)
        wide = [part.astype(mx.float32) for part in parts[1:]]
        meant = mx.dequantize(parts[0], *wide, group_size=GROUP, bits=bits)
        as_bits = [np.array(part.view(mx.uint16)) for part in parts[1:]]
        arrays = {"weight": np.array(parts[0]), "scales": as_bits[0], "biases": as_bits[1]}
        found[f"mlx-{bits}"] = arrays, np.array(meant)
    return found


def compressed_floats(weights: Any) -> dict[str, Any]:
    """NVFP4, MXFP4 and MXFP8 of compressed-tensors."""
    import torch
    from compressed_tensors.compressors import (
        MXFP4PackedCompressor,
        MXFP8QuantizationCompressor,
        NVFP4PackedCompressor,
    )
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    found = {}
    for case, compressor, options in (
        ("nvfp4", NVFP4PackedCompressor, {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4", MXFP4PackedCompressor, {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("mxfp8", MXFP8QuantizationCompressor, {"num_bits": 8, "strategy": "group", "group_size": 32}),
    ):
        args = QuantizationArgs(type="float", symmetric=True, **options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        peak = weights.reshape(ROWS, -1, options["group_size"]).abs().amax(-1)
        state = {"weight": weights}
        if case == "nvfp4":
            overall = (448 * 6 / weights.abs().max()).reshape(1)
            state["weight_global_scale"] = overall
            state["weight_scale"] = (peak / 6 * overall).to(torch.float8_e4m3fn).float()
        else:
            state["weight_scale"] = 2.0 ** (peak.log2().floor() - (2 if case == "mxfp4" else 8))
        parts = compressor.compress(state, scheme)
        scale = parts["weight_scale"]
        scale = compressor._decompress_scale(scale, torch.float32) if case != "mxfp8" else 2.0 ** (scale.float() - 127)
        packed = parts.get("weight_packed")
        values = parts["weight"].float() if packed is None else unpack_fp4_from_uint8(packed, ROWS, COLUMNS).float()
        overall = parts.get("weight_global_scale")
        found[f"compressed-{case}"] = parts, dequantize(values, scale, None, args, torch.float32, overall)
    return found


def mlx_floats(weights: Any) -> dict[str, Any]:
    """The modes of floats of MLX."""
    import mlx.core as mx

    found = {}
    for mode in ("nvfp4", "mxfp4", "mxfp8"):
        parts = mx.quantize(mx.array(weights.numpy()), mode=mode)
        meant = mx.dequantize(*parts, mode=mode, dtype=mx.float32)
        found[f"mlx-{mode}"] = dict(zip(("weight", "scales"), map(np.array, parts), strict=True)), np.array(meant)
    return found


def modelopt(weights: Any) -> dict[str, Any]:
    """NVFP4 and MXFP4 of Model Optimizer; FP8 with the scales of a matrix and of rows by its definition."""
    import torch
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    packed, scale, overall = NVFP4QTensor.quantize(weights.clone(), 16)
    meant = packed.dequantize(torch.float32, scale=scale, double_scale=overall, block_sizes={-1: 16})
    nvfp4 = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": overall}
    found = {"modelopt-nvfp4": (nvfp4, meant)}
    packed, scale = MXFP4QTensor.quantize(weights.clone(), 32)
    meant = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    found["modelopt-mxfp4"] = {"weight": packed._quantized_data, "weight_scale": scale.reshape(ROWS, -1)}, meant
    return found


def bitsandbytes(weights: Any) -> dict[str, Any]:
    """NF4 and FP4, with and without quantized scales, and LLM.int8()."""
    import torch
    from bitsandbytes import functional

    found = {}
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            codes, state = functional.quantize_4bit(weights, None, None, 64, double, kind)
            parts = {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
            case = f"bitsandbytes-{kind}{'-double' * double}"
            found[case] = parts, functional.dequantize_4bit(codes, state)
    codes, peaks, _ = functional.int8_vectorwise_quant(weights.half())
    meant = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, peaks)
    parts = {"weight": codes, "SCB": peaks, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    found["bitsandbytes-int8"] = parts, meant
    return found


def autoround(weights: Any) -> dict[str, Any]:
    """Both of AutoRound's packings of integers."""
    import torch
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    found = {}
    for layout, module in (("auto_round", qlinear_torch), ("auto_gptq", qlinear_torch_zp)):
        for bits in (2, 3, 4, 5, 8):
            most = (1 << bits) - 1
            grouped = weights.reshape(ROWS, -1, GROUP)
            low, high = grouped.amin(2), grouped.amax(2)
            scales = ((high - low) / most).half().float()
            zeros = (-low / scales).round().clamp(1, most)
            linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            linear.weight.data = weights.clone()
            made = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False)
            made.device = "cpu"
            made.pack(linear, scales, zeros, None, device="cpu")
            wide = torch.eye(COLUMNS)
            made.scales = made.scales.float()
            meant = made(wide).T
            parts = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales.half()}
            found[f"autoround-{layout}-{bits}"] = parts, meant
    return found


if __name__ == "__main__":
    main()
