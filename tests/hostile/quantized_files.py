"""GGUF files and quantized checkpoints: headers, metadata, types, scales and configurations, converted."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import gguf_files
import quantizers
from checkpoints import MIXTURE, make_config, random_tensors

from hostile.case import Case, Place, change_json, damage, flip_bits, read_header, write, write_header
from hostile.values import NUMBERS, TEXTS, shown, strange

FORMATS: dict[str, tuple[dict[str, Any], quantizers.Quantizer]] = {
    "fp8": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 24]},
        partial(quantizers.fp8, block=(16, 24)),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}, quantizers.gptq),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
        quantizers.awq,
    ),
    "mlx": ({"bits": 4, "group_size": 8}, quantizers.mlx),
    "pack": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 16}}}},
        partial(quantizers.pack_quantized, group=16, symmetric=False, act_order=True),
    ),
    "int8": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}},
        partial(quantizers.int_quantized, symmetric=False),
    ),
    "blocks": (
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "block_structure": [16, 24]}}}},
        lambda weights: quantizers.scaled_fp8(weights, (16, 24)),
    ),
}
COMPRESSED = {"pack": "pack-quantized", "int8": "int-quantized", "blocks": "float-quantized"}
"""Those of compressed-tensors, and their layouts."""
for _name, _layout in COMPRESSED.items():
    FORMATS[_name][0].update(quant_method="compressed-tensors", format=_layout, ignore=["lm_head"])
_KEYS = ("general.alignment", "split.count", "split.no", "qwen3.rope.scaling.type", "qwen3.rope.scaling.factor")
_PACKED: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "weight_packed", "weight_scale")
_PACKED += ("weight_shape", "weight_zero_point", "weight_g_idx")
_PATTERNS = (b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\x7c\0\x7c")
KINDS = ("BF16", "Q8_0", "Q4_K")


def make_quantized(bases: Path) -> None:
    """Write undamaged ones beside the bases."""
    for name, (entry, quantizer) in FORMATS.items():
        of_mlx = name == "mlx"
        changes = MIXTURE if name == "fp8" else {}
        config = make_config(hidden_size=64, intermediate_size=96, vocab_size=346, **changes)
        config["quantization" if of_mlx else "quantization_config"] = entry
        plain = () if of_mlx else quantizers.UNQUANTIZED
        quantizers.write_quantized(bases / name, config, random_tensors(config), quantizer, plain=plain)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(bases / "dense" / file, bases / name / file)
    (bases / "gguf").mkdir()
    config = gguf_files.config(num_hidden_layers=1)
    for kind in KINDS:
        tensors, _ = gguf_files.plain(config) if kind == "BF16" else gguf_files.quantized(kind, config)
        path = bases / "gguf" / f"{kind}.gguf"
        path.write_bytes(gguf_files.encode(gguf_files.metadata(config), tensors))


def ggufs(random: Random, place: Place) -> Case:
    """One file of a GGUF model: bytes of its header, or entries of its metadata."""
    kind = random.choice(KINDS)
    path = place.directory / "model.gguf"
    raw = (place.bases / "gguf" / f"{kind}.gguf").read_bytes()
    how = random.random()
    if how < 0.15:
        label, content = damage(raw, random)
    elif how < 0.45:
        end = raw.index(b"token_embd") + 3000  # metadata, and the tensors' names, shapes and types
        label, content = "bits of the header", flip_bits(raw[:end], random) + raw[end:]
    elif how < 0.6:
        at = random.choice([4, 8, 16]) if random.random() < 0.5 else random.randrange(raw.index(b"token_embd") + 3000)
        number = random.choice([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])
        label, content = f"{number} at byte {at}", raw[:at] + struct.pack("<Q", number) + raw[at + 8 :]
    elif how < 0.7:
        label, content = "weights of any bytes", raw[:-50_000] + random.randbytes(50_000)
    else:
        config = gguf_files.config(num_hidden_layers=1)
        entries = gguf_files.metadata(config)
        key = random.choice([*entries, *_KEYS, "x" * 70_000])
        entries[key] = value = _value(random)
        label = f"{key[:80]} = {shown(value)}"
        content = gguf_files.encode(entries, gguf_files.plain(config)[0])
    write(path, content)
    out = str(place.directory / "out")
    args = ["convert", str(path), out, "--bits", random.choice("348"), "--quiet"]
    if random.random() < 0.3:
        args = ["generate", str(path), "ab", "-n", "2", "-t", "1", "--quiet"]
    return Case(f"{kind}: {label}", args, environment=place.cache(), panics=True)


def _value(random: Random) -> Any:
    """A value of metadata, or bytes of one: a type, and what should follow it."""
    kind = random.random()
    if kind < 0.3:
        return random.choice([number for number in NUMBERS if isinstance(number, int) and 0 <= number < 2**32])
    if kind < 0.4:
        return random.choice([number for number in NUMBERS if isinstance(number, float) and not 3e38 < number < 2e308])
    if kind < 0.6:
        return random.choice(TEXTS).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if kind < 0.7:
        return random.choice([True, False, ["a"] * 5, ["x" * 10_000] * 9, [1] * 110, [-1], ["a b"] * 50_000])
    if kind < 0.9:
        count = random.choice([0, 1, 2**31, 2**62, 2**64 - 1])
        return struct.pack("<IIQ", 9, random.choice([0, 4, 8, 9, 12, 99]), count)
    nested = struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * random.choice([10, 5000])
    return random.choice([nested, struct.pack("<I", 99), struct.pack("<Id", 12, 1e300), struct.pack("<IQ", 8, 2**40)])


def quantized_checkpoints(random: Random, place: Place) -> Case:
    """FP8, GPTQ, AWQ or MLX: an entry of config.json, a header or the tensors."""
    return _case(random.choice([name for name in FORMATS if name not in COMPRESSED]), _change, random, place)


def compressed_tensors(random: Random, place: Place) -> Case:
    """compressed-tensors: groups of config.json, a header or the tensors."""
    return _case(random.choice(list(COMPRESSED)), _change_groups, random, place)


def _case(name: str, change: Callable[[dict[str, Any], Random], str], random: Random, place: Place) -> Case:
    """change: makes a change in config.json, and says which."""
    model = place.copy(name)
    path = model / "model.safetensors"
    kind = random.random()
    if kind < 0.45:
        labels: list[str] = []
        change_json(model / "config.json", lambda config: labels.append(change(config, random)))
        label = labels[0]
    elif kind < 0.5:
        how, content = damage(path.read_bytes(), random)
        write(path, content)
        label = f"model.safetensors: {how}"
    else:
        header, data = read_header(path)
        names = [tensor for tensor in header if tensor != "__metadata__"]
        packed = [tensor for tensor in names if tensor.endswith(_PACKED)]
        tensor = random.choice(packed or names)
        start, end = header[tensor]["data_offsets"]
        if kind < 0.75:
            pattern = random.choice(_PATTERNS)
            filled = (pattern * (end - start))[: end - start]
            part = random.choice([end - start, 4])
            data = data[:start] + filled[:part] + data[start + part :]
            label = f"{tensor}: {part} bytes of {pattern.hex()}"
        elif kind < 0.82:
            label = f"no {tensor}"
            del header[tensor]
        elif kind < 0.88:
            module = tensor.rpartition(".")[0]
            ends = ["qweight", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "bias", "x" * 100_000, ""]
            ends += ["weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "\ud800", "\x1b[31m"]
            new = random.choice(["", "x.", "x" * 100_000 + ".", f"{module}."]) + random.choice(ends)
            header[new] = header[tensor] if random.random() < 0.5 else header.pop(tensor)
            label = f"{tensor} as {shown(new)}"
        else:
            field = random.choice(["dtype", "shape"])
            shape = header[tensor]["shape"]
            dtypes = ["F8_E4M3", "F8_E5M2", "I32", "U32", "F32", "BF16", "I8", "U8", "F16", "x"]
            shapes = [shape[::-1], [*shape, 1], [], [0], [-1, 5], [2**31, 2**31], [1, math.prod(shape)]]
            shapes += [[math.prod(shape), 1], [2 * side for side in shape], [side // 2 for side in shape], [0, 2**62]]
            options = dtypes if field == "dtype" else shapes
            header[tensor][field] = random.choice(options)
            label = f"{tensor}: {field} = {header[tensor][field]}"
        write_header(path, header, data)
    out = str(place.directory / "out")
    return Case(f"{name}: {label}", ["convert", str(model), out, "--bits", random.choice("34"), "--quiet"])


def _change_groups(config: dict[str, Any], random: Random) -> str:
    """Change the entry of compressed-tensors in config.json; says how."""
    entry = config["quantization_config"]
    if random.random() < 0.05:
        config["quantization_config"] = strange(random)
        return f"quantization_config = {shown(config['quantization_config'])}"
    if random.random() < 0.3:
        fields = ["format", "config_groups", "sparsity_config", "transform_config", "ignore", "quantization_status"]
        field = random.choice([*fields, "kv_cache_scheme", "version", "quant_method"])
        values = [*COMPRESSED.values(), "marlin-24", "dense", {"format": "sparse-bitmask"}, {"format": 5}, {}, {"": {}}]
        entry[field] = random.choice(values) if random.random() < 0.5 else strange(random)
        return f"{field} = {shown(entry[field])}"
    groups = entry["config_groups"]
    if random.random() < 0.1:
        count = random.choice([2, 100, 20_000])
        for n in range(count):
            groups[f"group_{n}"] = {"weights": {"num_bits": 8, "block_structure": [1 + n, 1 + n % 7]}}
        return f"{count} groups"
    where = groups["group_0"] if random.random() < 0.2 else groups["group_0"]["weights"]
    fields = [
        "num_bits",
        "type",
        "group_size",
        "strategy",
        "symmetric",
        "block_structure",
        "actorder",
        "format",
        "weights",
    ]
    field = random.choice([*fields, "num_bits", "block_structure"])
    sizes = [-1, 0, 1, 2, 3, 5, 8, 9, 16, 2**31, 2**63, 10**400, 1e300, [0, 0], [1, 1], [10**9, 10**9], [16], "4", True]
    sizes += [[1 << 20, 1 << 20], [16, 24, 1], [True, 4], [4.0, 4], "float", "pack-quantized", None]
    where[field] = random.choice(sizes) if random.random() < 0.8 else strange(random)
    return f"{field} = {shown(where[field])}"


def _change(config: dict[str, Any], random: Random) -> str:
    """Change how config.json says that the weights are quantized; says how."""
    key = "quantization" if "quantization" in config else "quantization_config"
    entry = config[key]
    if random.random() < 0.1:
        config[key] = strange(random)
        return f"{key} = {shown(config[key])}"
    more = ["modules_to_not_convert", "ignored_layers", "checkpoint_format", "mode", "quant_method", "config_groups"]
    field = random.choice([*entry, *more, "format"])
    sizes = [-1, 0, 1, 2, 3, 5, 8, 16, 32, 2**31, 2**63, 1e300, [0, 0], [1, 1], [10**9, 10**9], [16], "4", ["lm_head"]]
    entry[field] = random.choice(sizes) if random.random() < 0.6 else strange(random)
    return f"{key}.{field} = {shown(entry[field])}"
