"""NaN, infinity, huge and subnormal weights, in checkpoints and in the units of converted models."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from hostile.case import Case, Place, read_header, write_header

_PATTERNS = {
    "BF16": [0x7FC0, 0xFFC0, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x0001, 0x8001, 0x0080, 0x0000, 0x7F00, 0x4F00],
    "F16": [0x7E00, 0x7C00, 0xFC00, 0x7BFF, 0xFBFF, 0x0001, 0x8001, 0x0400, 0x0000],
    "F32": [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000001, 0x00800000, 0, 0x7F000000],
}
_CODES = {"BF16": "<H", "F16": "<H", "F32": "<I"}
LONG = "once upon a time there was a little fox who could not sleep. " * 24
"""A prompt of more tokens than one pass takes."""


def sources(random: Random, place: Place) -> Case:
    """Weights of a checkpoint, which is converted and run in one command."""
    base = random.choice(["dense", "mixture", "mixture"])
    model = place.copy(base)
    path = model / "model.safetensors"
    header, data = read_header(path)
    dtype = random.choice(["BF16", "BF16", "F16", "F32"])
    header, content = _stored(header, data, dtype)
    labels = [_poison(header, content, dtype, random) for _ in range(random.choice([1, 1, 2, 5]))]
    write_header(path, header, bytes(content))
    bits, prompt = random.choice(["3", "4", "8", "16"]), random.choice(["once upon a time", LONG])
    args = ["generate", str(model), prompt, "--bits", bits, "-n", "2", "-t", random.choice("12"), "--quiet"]
    return Case(f"{base}, {dtype} to {bits} bits: {', '.join(labels)}", args, environment=place.cache())


def _stored(header: dict[str, Any], data: bytes, dtype: str) -> tuple[dict[str, Any], bytearray]:
    """The file with another dtype: BF16's upper bits are F32's, and F16 holds what both can."""
    if dtype == "BF16":
        return header, bytearray(data)
    import numpy as np

    wide = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    scale = 2 if dtype == "F32" else 1
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"] = dtype
            entry["data_offsets"] = [scale * offset for offset in entry["data_offsets"]]
    return header, bytearray(wide.astype("<f4" if dtype == "F32" else "<f2").tobytes())


def _poison(header: dict[str, Any], content: bytearray, dtype: str, random: Random) -> str:
    """Overwrite one weight, a row or all of a tensor."""
    names = [name for name in header if name != "__metadata__"]
    routers = [name for name in names if name.endswith("mlp.gate.weight")]
    name = random.choice(routers if routers and random.random() < 0.5 else names)
    pattern = random.choice(_PATTERNS[dtype])
    start, end = header[name]["data_offsets"]
    size = struct.calcsize(_CODES[dtype])
    total = (end - start) // size
    count = random.choice([1, 1, min(72, total), total])
    first = random.randrange(total - count + 1)
    value = struct.pack(_CODES[dtype], pattern)
    content[start + size * first : start + size * (first + count)] = value * count
    return f"{name} {count} x {pattern:#x}"


def units(random: Random, place: Place) -> Case:
    """Bytes of a converted model's tensors, scales above all."""
    base = random.choice(["dense-3", "dense-4", "dense-8", "dense-16"] + ["mixture-3", "mixture-4", "mixture-8"] * 2)
    base = random.choice([base, base, "mixture-16"])
    model = place.copy(base)
    path = model / "model.safetensors"
    header, data = read_header(path)
    content = bytearray(data)
    labels = []
    names = [name for name in header if name != "__metadata__"]
    routers = [name for name in names if ".mlp.gate." in name]
    for _ in range(random.choice([1, 1, 2, 10])):
        name = random.choice(routers if routers and random.random() < 0.5 else names)
        start, end = header[name]["data_offsets"]
        kind = random.choice(["random", "ones", "NaN", "infinity", "largest", "subnormal", "all random"])
        at = start + random.randrange(max(1, end - start) // 4) * 4 if random.random() < 0.5 else start
        size = min(random.choice([1, 4, 64, 1000, end - start]), end - at)
        patterns = {"NaN": 0x7FC07FC0, "infinity": 0x7F800000, "largest": 0x7F7FFFFF, "subnormal": 1, "ones": 2**32 - 1}
        if kind == "all random":
            content[start:end] = random.randbytes(end - start)
        elif kind == "random":
            content[at : at + size] = random.randbytes(size)
        else:
            content[at : at + size] = (struct.pack("<I", patterns[kind]) * (size // 4 + 1))[:size]
        labels.append(f"{name} {kind}")
    write_header(path, header, bytes(content))
    prompt = random.choice(["once upon a time", "x", LONG, LONG])
    args = ["generate", str(model), prompt, "-n", random.choice("13"), "-t", random.choice("12"), "--quiet"]
    if random.random() < 0.3:
        args += ["--kv", random.choice(["int8", "f16", "f32"])]
    return Case(f"{base}: {', '.join(labels)}"[:300], args)
