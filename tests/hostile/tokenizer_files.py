"""tokenizer.json: damaged, of other kinds, and with settings that make the tokenizers library panic or slow."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from hostile.case import Case, Place, damage, write
from hostile.configs import command, large_json
from hostile.values import shown, strange

_NORMALIZERS: list[Any] = [
    None,
    {"type": "NFC"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKD"}]},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "  "}] * 24},
    {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"},
    {"type": "Prepend", "prepend": "x" * 100_000},
    {"type": "Lowercase"},
]
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SPLITS: list[Any] = [
    {"type": "FixedLength", "length": 0},
    {"type": "FixedLength", "length": 5},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "(?:" * 3000 + ")" * 3000}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "(?:a{1,1000}){1,1000}"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    {"type": "Digits", "individual_digits": True},
    None,
]


def tokenizer_files(random: Random, place: Place) -> Case:
    """One or two changes of tokenizer.json."""
    base = random.choice(["dense-4", "mixture-4", "dense"])
    model = place.copy(base)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if random.random() < 0.15:
        label, content = damage(path.read_bytes(), random)
        write(path, content)
    elif random.random() < 0.02:
        label = large_json(path, random)
    else:
        labels = [_change(tokenizer, random) for _ in range(random.choice([1, 1, 2]))]
        label = ", ".join(labels)
        text = json.dumps(tokenizer)
        if random.random() < 0.05:
            name = random.choice(["continuing_subword_prefix", "end_of_word_suffix", "added_tokens", "type", "content"])
            text = text.replace(f'"{name}": ""', f'"{name}": "x"').replace(name, name.replace("e", "\\u0065", 1))
            label += f", {name} with an escape"
        write(path, text)
    args = command(random, place, model, is_checkpoint=base == "dense")
    text = random.choice(["once", "x" * 30, "xxxxxxxxxxxxxxxxxxxxxxxxxxz", "a" * 3000, "a b " * 800, "<|im_end|>é"])
    return Case(f"{base}: {label[:200]}", [text if arg == "once upon a time" else arg for arg in args], panics=True)


def _change(tokenizer: dict[str, Any], random: Random) -> str:
    kind = random.choice(["model", "vocab", "merges", "added", "normalizer", "split", "part", "part", "decoder"])
    model: Any = tokenizer.get("model")
    vocab: Any = model.get("vocab") if isinstance(model, dict) else None
    if not (isinstance(vocab, dict) and vocab and isinstance(tokenizer["added_tokens"], list)):
        kind = "part"  # an earlier change has left nothing else to change
    if kind == "model":
        fields: list[Any] = ["type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"]
        key = random.choice([*fields, "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"])
        model[key] = random.choice(["x", "\0", "##", "BPE", "WordPiece", "Unigram", "WordLevel", 0.5, strange(random)])
        return f"model.{key} = {shown(model[key])}"
    if kind == "vocab":
        key = random.choice(list(vocab))
        how = random.choice(["moved", "removed", "same", "large", "renamed", "cut"])
        if how == "moved":
            vocab[key] = random.choice([10**6, 2**31, 2**32 - 1, 400, 5000])
        elif how == "same":
            vocab[key] = vocab[random.choice(list(vocab))]
        elif how == "large":
            vocab.update({f"extra{n}": 400 + n for n in range(20_000)})
        elif how == "renamed":
            vocab[random.choice(["", "x" * 100_000, "\ud800", "é", "\0", "<|im_end|>"])] = vocab.pop(key)
        else:
            keep = random.choice([0, 1, 255, 256, 300]) if how == "cut" else -1
            for n, name in enumerate(list(vocab)):
                if (keep >= 0 and n >= keep) or (keep < 0 and name == key):
                    del vocab[name]
        return f"vocab {how}: {shown(key)}"
    if kind == "merges":
        merges: list[Any] = [["a", "b"], ["", ""], "a b", "abc", ["Ġ"], ["!", '"', "#"], 5, None, ["x" * 10**5, "y"]]
        merge = random.choice(merges)
        model["merges"] = [merge, *model["merges"]] if isinstance(model["merges"], list) else merge
        return f"merge {shown(merge)}"
    if kind == "added":
        added = random.choice(tokenizer["added_tokens"] or [{"id": 0, "content": "x", "special": True}])
        key = random.choice(list(added))
        contents = ["", " ", "a", "e", "\n", "\0", "x" * 100_000, "\ud800", "<|im_end|>", "é"]
        others = [0, 5, 2**32, True, strange(random)]
        added[key] = random.choice(contents if key == "content" else others)
        if random.random() < 0.1:
            more = [added | {"id": 400 + n, "content": f"{n} {added['content']}"} for n in range(100)]
            tokenizer["added_tokens"] = random.choice([[], None, [added] * 1000, more, strange(random)])
        return f"added {key} = {shown(added[key])}"
    name = {"normalizer": "normalizer", "split": "pre_tokenizer"}.get(kind, "decoder")
    if kind == "part":
        name = random.choice([*_PARTS, "truncation", "padding", "model"])
        value = strange(random)
        if name in ("truncation", "padding"):
            sizes = {"max_length": random.choice([0, 1, 5]), "stride": random.choice([0, 9]), "direction": "Right"}
            strategy = random.choice(["LongestFirst", {"Fixed": 10**9}, "BatchLongest"])
            value = {**sizes, "strategy": strategy, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    else:
        value = random.choice(_NORMALIZERS if kind == "normalizer" else _SPLITS)
        if kind == "decoder":
            value = random.choice([*_SPLITS, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Fuse"}])
    tokenizer[name] = value
    return f"{name} = {shown(value)}"
