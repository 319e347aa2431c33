"""config.json: every field with strange values, in converted models and in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from hostile.case import Case, Place, change_json, damage, write
from hostile.values import NUMBERS, nested, shown, strange

_EXTRA = (
    "rope_parameters", "rope_scaling", "num_experts", "num_local_experts", "num_experts_per_tok", "mlp_only_layers",
    "moe_intermediate_size", "decoder_sparse_step", "norm_topk_prob", "layer_types", "quantization_config",
    "compression_config", "text_config", "sliding_window", "torch_dtype", "dtype", "architectures", "auto_map",
)  # fmt: skip
_YARN = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "type")
_MADE = ("quant_method", "format_version", "bits", "created_by", "encodings", "evaluation", "calibration")
_RECORD = ("text", "tokens", "window", "stride", "against", "perplexity", "kl_divergence", "kl_error", "top_1")


def configs(random: Random, place: Place) -> Case:
    """One or a few fields, or the whole file, of config.json."""
    base = random.choice(["dense-4", "mixture-4", "dense-16", "dense-4", "mixture-4", "dense", "mixture", "shards"])
    model = place.copy(base)
    path = model / "config.json"
    kind = random.random()
    if kind < 0.1:
        label, content = damage(path.read_bytes(), random)
        write(path, content)
    elif kind < 0.15:
        label = random.choice(["[]", "null", "1", "NaN", '"x"', "{}", "[" * 100_000, '{"a":' * 3000, "1" * 5000])
        write(path, label)
    elif kind < 0.16:
        label = large_json(path, random)
    else:
        labels: list[str] = []
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            change_json(path, lambda config: labels.append(_change(config, random)))
        label = ", ".join(labels)
    return Case(f"{base}: {label[:200]}", command(random, place, model, is_checkpoint="-" not in base))


def large_json(path: Path, random: Random) -> str:
    """Add a key to a JSON file that makes it large, and its value larger; says how."""
    piece = random.choice(["{},", "[],", '{"a":0},', "[[]],", '"",', "1e5,", '"\U0001f642é",', '"\\ud83d\\ude42",'])
    size = random.choice([1_000_000, 2_900_000, 15_000_000, 20_000_000, 99_000_000])
    raw = path.read_bytes().rstrip()[:-1]
    write(path, raw + b', "large": [')
    many = piece.encode() * (1 + 1_000_000 // len(piece.encode()))
    with open(path, "ab") as file:  # in parts: what it takes to make a case counts as memory of the command
        for _ in range(-(-size // len(many))):
            file.write(many)
        file.write(b"0]}")
    return f"{size:,} bytes of {piece}"


def command(random: Random, place: Place, model: Path, *, is_checkpoint: bool) -> list[str]:
    """A command that reads a model."""
    if is_checkpoint:
        bits = random.choice(["3", "4", "8", "16"])
        return ["convert", str(model), str(place.directory / "out"), "--bits", bits, "--quiet"]
    kind = random.random()
    if kind < 0.3:
        return ["info", str(model), *random.choice([[], ["--json"], ["--context", "100"]])]
    if kind < 0.5:
        return ["chat", str(model), "What is this?", "-n", "2", "-t", "1", "--quiet"]
    options = ["--seed", "1"] if random.random() < 0.5 else ["--temperature", "0"]
    if random.random() < 0.1:
        options += ["--yarn", "2"]
    return ["generate", str(model), "once upon a time", "-n", "2", "-t", random.choice("112"), *options]


def _change(config: dict[str, Any], random: Random) -> str:
    """Change a field; says which, and how."""
    keys = [*config, *_EXTRA]
    if random.random() < 0.2:
        keys = ["rope_scaling", "rope_parameters", "quantization_config"]
    key = random.choice(keys)
    made = config.get("quantization_config")
    if key in ("rope_scaling", "rope_parameters") and random.random() < 0.8:
        field, value = random.choice(_YARN), random.choice(NUMBERS) if random.random() < 0.8 else strange(random)
        yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
        config[key] = yarn | {field: value}
        return f"{key}.{field} = {shown(value)}"
    if key == "quantization_config" and isinstance(made, dict) and random.random() < 0.8:
        field, value = random.choice(_MADE), strange(random)
        encodings = made.get("encodings")
        if field == "evaluation" and random.random() < 0.8:
            record = dict.fromkeys(_RECORD, 1) | {"text": "a", "against": "bf16"}
            value = record | {random.choice(_RECORD): value}
        elif field == "encodings" and isinstance(encodings, dict) and encodings and random.random() < 0.8:
            name = random.choice([*encodings, "x" * 100_000, ""])
            value = encodings | {name: random.choice(["int3", "int4", "int5", "int6", "int8", "bf16", value])}
        made[field] = value
        return f"quantization_config.{field} = {shown(value)}"
    if random.random() < 0.1:
        config.pop(key, None)
        return f"no {key}"
    near = config.get(key)
    value = strange(random)
    if isinstance(near, int) and random.random() < 0.3:
        value = random.choice([near - 1, near + 1, 2 * near, -near, near // 2, near * 1.0, str(near), near << 20])
    if random.random() < 0.02:
        value = nested(900)
    config[key] = value
    return f"{key} = {shown(value)}"


def other_files(random: Random, place: Place) -> Case:
    """generation_config.json, tokenizer_config.json and special_tokens_map.json with strange values."""
    base = random.choice(["dense-4", "mixture-4", "dense-16"])
    model = place.copy(base)
    name = random.choice(["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
    path = model / name
    if not path.exists():
        write(path, json.dumps({"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}}))
    fields = ["eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "stop"]
    if name != "generation_config.json":
        fields = ["eos_token", "bos_token", "chat_template", "pad_token", "additional_special_tokens", "unk_token"]
    labels: list[str] = []

    def change(content: Any) -> None:
        for _ in range(random.choice([1, 1, 2])):
            key = random.choice([*fields, *content]) if random.random() < 0.9 else strange_name(random)
            content[key] = _special(random) if random.random() < 0.4 else strange(random)
            labels.append(f"{name}: {key[:50]} = {shown(content[key])}")

    kind = random.random()
    if kind < 0.1:
        how, content = damage(path.read_bytes(), random)
        write(path, content)
        labels.append(f"{name}: {how}")
    elif kind < 0.12:
        labels.append(f"{name}: {large_json(path, random)}")
    else:
        change_json(path, change)
    return Case(f"{base}: {', '.join(labels)}"[:200], command(random, place, model, is_checkpoint=False))


def strange_name(random: Random) -> str:
    """A key that no such file has."""
    return random.choice(["", "x" * 100_000, "\ud800", "__class__", "eos_token_ids"])


def _special(random: Random) -> Any:
    return random.choice(
        [
            *({"content": strange(random)}, [320, 10**9], [320, "x"], [-1], list(range(346)), {"content": "x" * 10**5}),
            *("<|im_start|>", "é", "a", " ", [[1]], {"content": "<|im_end|>", "special": "no"}, "{% for a in b %}"),
        ]
    )
