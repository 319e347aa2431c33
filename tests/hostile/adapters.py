"""LoRA adapters: adapter_config.json, and factors of any shapes, numbers and names, merged in a conversion."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from checkpoints import write_safetensors

from hostile.case import Case, Place, change_json, damage, read_header, write, write_header
from hostile.values import TEXTS, shown, strange

RANK = 2
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj")
_CONFIG = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "down_proj"],
    "use_rslora": False, "use_dora": False, "alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None,
    "fan_in_fan_out": False, "lora_dropout": 0.0, "task_type": "CAUSAL_LM",
}  # fmt: skip
_KEYS = ("trainable_token_indices", "layer_replication", "lora_bias", "target_parameters", "exclude_modules")
_PATTERNS = (
    "q_proj", "(a+)+b", "(.*)*x", "(?:(?:(?:.*)*)*)*y", "(", "[", "\\1", "(?P<a>x)(?P=a)", "a" * 100_000, "\0", "",
    "^model.layers.0.self_attn.q_proj", "(" * 5000 + ")" * 5000, "(?i)Q_PROJ", ".*" * 20 + "z", "(.|.)" * 40 + "z",
    "x{1000}{1000}{1000}", "(?s:.)" * 200, "(?=.*)(?=.*)+", "q_proj|k_proj|v_proj", ".*\\.q_proj", "(?<=a)b", "\\",
)  # fmt: skip
_FLOATS = (0.0, -1.0, 5e-324, 1e38, 1e39, 1e300, -1e308, float("nan"), float("inf"), 10**400, True, "4", None, [4])
_PATTERNS_OF_BYTES = (b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x7f\x7f\x7f\x7f", b"\1\0\0\0")


def make_adapter(bases: Path) -> None:
    """Write an undamaged adapter of the dense checkpoint beside the bases."""
    directory = bases / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    header, _ = read_header(bases / "dense" / "model.safetensors")
    tensors = {}
    for module in _MODULES:
        rows, columns = header[f"{module}.weight"]["shape"]
        for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            values = np.random.default_rng(rows + columns).standard_normal(shape, np.float32)
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values / 10
    write_safetensors(directory / "adapter_model.safetensors", tensors, "F32")


def adapters(random: Random, place: Place) -> Case:
    """One or two changes of an adapter's files, which is merged by `convert --adapter`."""
    model = place.copy(random.choice(["dense", "dense", "shards"]))
    adapter = place.copy("adapter", "adapter")
    labels = [_change(adapter, model, random) for _ in range(random.choice([1, 1, 2]))]
    given = str(adapter)
    if random.random() < 0.2:
        given += random.choice([":0.5", ":nan", ":1e308", ":", ":x", ":-0", "/", "/../adapter", ":1e400", ":0x10"])
        labels.append(f"given as {given[-12:]!r}")
    args = ["convert", str(model), str(place.directory / "out"), "--bits", random.choice(["4", "8", "16"]), "--quiet"]
    args += ["--adapter", given] * random.choice([1, 1, 1, 2])
    if random.random() < 0.1:
        args.append("--dry-run")
    return Case(", ".join(labels)[:300], args)


def _change(adapter: Path, model: Path, random: Random) -> str:
    kind = random.random()
    path = adapter / random.choice(["adapter_config.json", "adapter_model.safetensors"])
    if kind < 0.1 and path.exists():
        how, content = damage(path.read_bytes(), random)
        write(path, content)
        return f"{path.name}: {how}"
    if kind < 0.15:
        path.unlink(missing_ok=True)
        target = random.choice(["/dev/zero", "missing", ".", "/etc/passwd", ""])
        if target:
            path.symlink_to(target)
        return f"{path.name}: {target or 'missing'}"
    if kind < 0.5:
        return _change_config(adapter / "adapter_config.json", random)
    if kind < 0.55:  # the checkpoint lacks what the adapter adapts
        found = _read(model / "model.safetensors")
        if found:
            name = random.choice(["model.embed_tokens.weight", *(f"{module}.weight" for module in _MODULES)])
            found[0].pop(name, None)
            write_header(model / "model.safetensors", *found)
            return f"a checkpoint without {name}"
    return _change_tensors(adapter / "adapter_model.safetensors", random)


def _change_config(path: Path, random: Random) -> str:
    labels: list[str] = []

    def change(config: dict[str, Any]) -> None:
        key = random.choice([*_CONFIG, *_KEYS, "lora_alpha", "alpha_pattern", "alpha_pattern"])
        value = strange(random)
        if key == "lora_alpha":
            value = random.choice(_FLOATS)
        elif key in ("alpha_pattern", "rank_pattern") and random.random() < 0.9:
            patterns = random.sample(_PATTERNS, random.choice([1, 1, 3]))
            value = {pattern: random.choice([4, *_FLOATS]) for pattern in patterns}
            if random.random() < 0.1:
                value = {f"{random.choice(_PATTERNS[:2])}{n}": 4 for n in range(50_000)}
        config[key] = value
        labels.append(f"{key} = {shown(value)}")

    try:
        change_json(path, change)
    except (OSError, ValueError, TypeError):  # an earlier change has left no object
        return "nothing"
    return labels[0]


def _read(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """The header and data of a file; None if an earlier change has left none."""
    try:
        header, data = read_header(path)
        return (header, data) if [name for name in header if name != "__metadata__"] else None
    except (OSError, ValueError, IndexError):
        return None
    except Exception:  # struct's
        return None


def _change_tensors(path: Path, random: Random) -> str:
    found = _read(path)
    if found is None:
        return "nothing"
    header, data = found
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    how = random.choice(
        ["shape", "shape", "rank", "dtype", "rename", "more", "remove", "fill", "fill", "twice", "many"]
    )
    label = f"{name[-25:]}: {how}"
    if how == "shape":
        shape = entry["shape"]
        shapes = [shape[::-1], [*shape, 1], [1, *shape], [], [0], [0, shape[1]], [-1, 2], [2**31, 2**31], [2**62, 4]]
        entry["shape"] = random.choice(shapes)
    elif how == "rank":  # both factors, of another rank
        rank = random.choice([0, 1, 7, 1000, 30_000])
        module = random.choice(_MODULES)
        rows, columns = random.choice([(64, 64), (64, 128), (32, 64)])
        for factor, shape in (("A", [rank, columns]), ("B", [rows, rank])):
            size = 4 * shape[0] * shape[1]
            added = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
            header[f"base_model.model.{module}.lora_{factor}.weight"] = added
            data += bytes(size)
        label = f"rank {rank} of {rows} x {columns}"
        header = {one: entry for one, entry in header.items() if one == "__metadata__" or module in one}
    elif how == "dtype":
        entry["dtype"] = random.choice(["F64", "F16", "BF16", "I8", "F8_E4M3", "I64", "x" * 100_000, 4, None])
    elif how == "rename":
        ends = ["x" * 100_000, "\ud800", "model.norm.weight", "lm_head.weight", "model.embed_tokens.lora_embedding_A"]
        module = f"base_model.model.{_MODULES[0]}"
        ends += [
            f"{module}.lora_A.bias",
            f"{module}.lora_C.weight",
            f"{module}.lora_magnitude_vector",
            f"{module}.bias",
        ]
        ends += [f"{'x.' * 20_000}lora_A.weight", f"{module}.base_layer.weight", "base_model.model.lora_A.weight", ""]
        ends += [f"{module}.modules_to_save.weight", ".lora_A.weight", "lora_A.weight", *TEXTS]
        new = random.choice(ends)
        header = {new if one == name else one: entry for one, entry in header.items()}
        label += f" to {shown(new)}"
    elif how == "more":
        size = random.choice([0, 4, 64 * 64 * 4])
        names = [name.removeprefix("base_model.model."), "base_model.model.model.norm.weight", "x.weight", "x" * 10**5]
        shape = random.choice([[size // 4], [64, size // 256], [64]])
        header[random.choice(names)] = {
            "dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size],
        }  # fmt: skip
        data += bytes(size)
    elif how == "remove":
        del header[name]
    elif how == "fill":
        start, end = entry["data_offsets"]
        pattern, size = random.choice(_PATTERNS_OF_BYTES), random.choice([4, end - start])
        data = data[:start] + (pattern * (size // 4)) + data[start + size :]
        label += f" {size} bytes of {pattern.hex()}"
    elif how == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        write_header(path, text.encode("utf-8", "replace"), data)
        return label
    else:
        for n in range(random.choice([1000, 20_000])):
            module = f"base_model.model.model.layers.{n}.self_attn.q_proj"
            for factor in random.choice(["A", "AB"]):
                header[f"{module}.lora_{factor}.weight"] = entry | {"shape": [0, 0], "data_offsets": [0, 0]}
    write_header(path, header, data)
    return label
