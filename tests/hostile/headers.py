"""Headers of safetensors files, and where shards are said to lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

from hostile.case import Case, Place, change_json, damage, flip_bits, read_header, write, write_header
from hostile.configs import command, large_json
from hostile.values import shown, strange

INDEX = "model.safetensors.index.json"


def headers(random: Random, place: Place) -> Case:
    """The header of model.safetensors, of a converted model or a checkpoint."""
    base = random.choice(["dense-4", "mixture-4", "dense-16", "dense-3", "dense", "mixture"])
    model = place.copy(base)
    path = model / "model.safetensors"
    header, data = read_header(path)
    label = random.choice(list(_CHANGES))
    if label == "damage":
        how, content = damage(path.read_bytes(), random)
        label += f": {how}"
        write(path, content)
    elif label == "length":
        length = random.choice([0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
        label += f" {length}"
        write(path, struct.pack("<Q", length) + path.read_bytes()[8:])
    elif label == "bits of the header":
        raw = path.read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        write(path, flip_bits(raw[:end], random) + raw[end:])
    else:
        found = _CHANGES[label](header, data, random)
        write_header(path, *found)
    return Case(f"{base}: {label}", command(random, place, model, is_checkpoint="-" not in base))


def _name(header: dict[str, Any], random: Random) -> str:
    return random.choice([name for name in header if name != "__metadata__"])


def _entry(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    header[_name(header, random)] = strange(random)
    return header, data


def _field(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    entry = header[_name(header, random)]
    entry[random.choice(["dtype", "shape", "data_offsets"])] = strange(random)
    return header, data


def _shape(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    entry = header[_name(header, random)]
    shapes = [[2**62] * 100_000, [2**31, 2**31, 4], [-1, -1], [0], [], [1] * 17, [2**63 - 1, 2], [0, 2**62], [1.0]]
    entry["shape"] = random.choice([*shapes, entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]])
    if random.random() < 0.3:
        entry["data_offsets"] = random.choice([[0, 0], [0, len(data)], entry["data_offsets"]])
    return header, data


def _offsets(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    entry = header[_name(header, random)]
    start, end = entry["data_offsets"]
    step = random.choice([1, 4, 64, -64, len(data), 2**40, 2**62, 2**64, -(2**63)])
    entry["data_offsets"] = random.choice(
        [[start + step, end + step], [start, end + step], [end, start], [start], [start, end, end], [0, 0], "0,4"]
    )
    return header, data


def _dtype(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    dtypes = ["F64", "F32", "F16", "BF16", "I8", "U8", "F8_E4M3", "BOOL", "I4", "x" * 100_000, "\x1b[2J", "f32", 4]
    header[_name(header, random)]["dtype"] = random.choice(dtypes)
    return header, data


def _rename(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    name = _name(header, random)
    names = ["", "x" * 100_000, "../../x", "\0", "\x1b[31m", "\ud800", name + " ", "model.layers.99999999999.x.weight"]
    new = random.choice([*names, "model.layers.-1.mlp.down_proj.weight", "lm_head.weight", name.upper()])
    return {new if old == name else old: entry for old, entry in header.items()}, data


def _swap(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    one, other = _name(header, random), _name(header, random)
    header[one], header[other] = header[other], header[one]
    return header, data


def _remove(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    del header[_name(header, random)]
    return header, data


def _add(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    size = random.choice([0, 4, 64, 100_000])
    entry = {"dtype": random.choice(["U8", "F32"]), "shape": [size], "data_offsets": [len(data), len(data) + size]}
    header[random.choice(["extra", "x" * 100_000, "model.norm.weight.codebook"])] = entry
    return header, data + bytes(size)


def _metadata(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    value = strange(random)
    header["__metadata__"] = random.choice(
        [value, {"format": value}, {"format": "npqwen", "format_version": random.choice(["1", "3", "99", value])}, {}]
    )
    return header, data


def _twice(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    name = _name(header, random)
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(strange(random))}}}"
    return text.encode("utf-8", "replace"), data


def _many(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    for n in range(random.choices([1000, 20_000, 200_000], [6, 3, 1])[0]):
        header[f"empty.{n}"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return header, data


def _text(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    texts = [b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"]
    return random.choice([*texts, json.dumps(header).encode("utf-16"), b" " * 100_000]), data


def _value(header: dict[str, Any], data: bytes, random: Random) -> tuple[Any, bytes]:
    return strange(random), data


_CHANGES: dict[str, Any] = {
    "damage": None, "length": None, "bits of the header": None, "entry": _entry, "field": _field, "shape": _shape,
    "offsets": _offsets, "dtype": _dtype, "rename": _rename, "swap": _swap, "remove": _remove, "add": _add,
    "metadata": _metadata, "twice": _twice, "many": _many, "text": _text, "value": _value,
}  # fmt: skip


def indexes(random: Random, place: Place) -> Case:
    """model.safetensors.index.json: files elsewhere, missing, or with impossible names."""
    base = random.choice(["shards", "dense-4"])
    model = place.copy(base)
    path = model / INDEX
    if base != "shards":
        header, _ = read_header(model / "model.safetensors")
        names = [name for name in header if name != "__metadata__"]
        write(path, json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}))
    labels: list[str] = []
    kind = random.random()
    if kind < 0.1:
        how, content = damage(path.read_bytes(), random)
        labels.append(how)
        write(path, content)
    elif kind < 0.12:
        labels.append(large_json(path, random))
    elif kind < 0.2:
        value = strange(random)
        labels.append(f"weight_map {shown(value)}")
        change_json(path, lambda index: index.update(weight_map=value))
    else:
        secret = place.directory / "secret.safetensors"
        os.link(place.bases / base / _shard(place.bases / base), secret)

        def change(index: dict[str, Any]) -> None:
            weight_map = index["weight_map"]
            chosen = list(weight_map) if random.random() < 0.3 else random.sample(list(weight_map), 1)
            file = _file(random, place, model)
            labels.append(f"{len(chosen)} in {shown(file)}")
            for name in chosen:
                weight_map[name] = file
            if random.random() < 0.2:
                weight_map[random.choice(["", "x" * 100_000, "\ud800", "extra"])] = file

        change_json(path, change)
    return Case(f"{base}: {', '.join(labels)}", command(random, place, model, is_checkpoint=base == "shards"))


def _shard(directory: Path) -> str:
    return next(file.name for file in sorted(directory.iterdir()) if file.name.endswith(".safetensors"))


def _file(random: Random, place: Place, model: Path) -> Any:
    """Where a tensor is said to be. Whatever is not a plain file of the directory may not be read."""
    link = model / "link.safetensors"
    target = random.choice(["link.safetensors", "missing", "/dev/zero", "/dev/full", ".", _shard(model)])
    os.symlink(target, link)
    shard, secret = _shard(model), str(place.directory / "secret.safetensors")
    return random.choice(
        [
            *("../secret.safetensors", secret, f"./{shard}", f"sub/../{shard}", "..", ".", "", "link.safetensors"),
            *("missing.safetensors", "x" * 255, "x" * 256, "x" * 100_000, "a\0b", "~/x", "c:\\x", "\ud800", "é" * 200),
            *("config.json", "/proc/self/mem", INDEX, " ", "a\nb", strange(random)),
        ]
    )
