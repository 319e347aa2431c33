"""Hybrids in GGUF: what llama.cpp writes, its old files and those with a draft layer, and what is refused."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import from_bf16, read_safetensors
from gguf_files import LLAMA, Tensors, encode
from gguf_hybrids import DATA, hybrid_gguf, llama_tensors
from hybrids import HYBRIDS, draft_tensors, golden, hybrid_checkpoint
from npqwen_quant import convert
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.gguf import GgufModel
from npqwen_quant.gguf_header import read_header

import npqwen
from npqwen.errors import CheckpointError
from npqwen.format.config import Config
from npqwen.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama.cpp's files of the hybrids."""
    place = tmp_path_factory.mktemp("gguf")
    return {name: hybrid_gguf(name, place) for name in HYBRIDS}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_file_is_its_checkpoint_to_the_byte(
    files: dict[str, Path], hybrid: Callable[[str, int], Path], tmp_path: Path, name: str
) -> None:
    convert(files[name], tmp_path / "out", 16)
    found, original = (place / "model.safetensors" for place in (tmp_path / "out", hybrid(name, 16)))
    assert found.read_bytes() == original.read_bytes()
    checkpoint = Checkpoint(hybrid_checkpoint(name, tmp_path / "checkpoint"))
    assert Checkpoint(files[name]).config == checkpoint.config
    assert Config.from_directory(tmp_path / "out") == checkpoint.config
    with npqwen.load(tmp_path / "out", threads=1) as model:
        ids = golden(name)[0][:40].tolist()
        assert model.generate(ids, temperature=0, max_tokens=48).ids == LLAMA[f"greedy-{name}"].tolist()


def test_the_pre_tokenizer_keeps_marks_with_letters(files: dict[str, Path], tmp_path: Path) -> None:
    for file in GgufModel([files["qwen35"]]).small_files:
        (tmp_path / file.name).write_bytes(file.read())
    split = json.loads((tmp_path / "tokenizer.json").read_bytes())["pre_tokenizer"]["pretokenizers"][0]
    assert "[\\p{L}\\p{M}]+" in split["pattern"]["Regex"]
    # A combining mark (and no precomposed letter, which NFC would make) does not end a word.
    text = "a x\u0302yz हिन्दी"
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def rewritten(name: str, path: Path, change: Callable[[dict[str, Any], Tensors], object]) -> Path:
    """A hybrid's file in F32 with changes of its metadata and tensors."""
    metadata: dict[str, Any] = dict(read_header(hybrid_gguf(name, path.parent)).metadata)
    for key, value in metadata.items():
        if isinstance(value, list) and value and isinstance(value[0], bool):
            metadata[key] = bools(value)
    tensors: Tensors = {}
    for key, values in llama_tensors(name).items():
        tensors[key] = "F32", values.shape, np.ascontiguousarray(values).tobytes()
    change(metadata, tensors)
    path.write_bytes(encode({key: value for key, value in metadata.items() if value != []}, tensors))
    return path


def with_draft(name: str, metadata: dict[str, Any], tensors: Tensors, layers: int = 1) -> None:
    """Add the draft layer of `hybrid_checkpoint(f"{name}+draft")`, as llama.cpp's converter does, numbered from 4 on.

    layers: how often.
    """
    (arch,) = {key.partition(".")[0] for key in metadata if key.endswith(".block_count")}
    metadata[f"{arch}.block_count"] = 4 + layers
    metadata[f"{arch}.nextn_predict_layers"] = layers
    metadata[f"{arch}.attention.recurrent_layers"] = bools([True, True, True, *[False] * (1 + layers)])
    stored = read_safetensors(DATA / name / "model.safetensors")
    stored = {key.replace("model.language_model.", "model."): values for key, values in stored.items()}
    own = {key: from_bf16(values) for key, values in draft_tensors(stored).items()}
    around = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    around["norm"] = "shared_head_norm"
    for layer in range(4, 4 + layers):
        # The layer is a copy of the last one.
        copies = {key.replace("blk.3.", f"blk.{layer}."): x for key, x in tensors.items() if key.startswith("blk.3.")}
        tensors |= copies
        for part, theirs in around.items():
            values = own[f"mtp.{part}.weight"] + np.float32(part != "fc")
            tensors[f"blk.{layer}.nextn.{theirs}.weight"] = "F32", values.shape, values.tobytes()


def bools(values: list[bool]) -> bytes:
    return struct.pack("<IIQ", 9, 7, len(values)) + bytes(values)


def as_old_files_do(metadata: dict[str, Any], tensors: Tensors) -> None:
    """Without a list of recurrent layers, and with the projections of Qwen3-Next as the checkpoint has them."""
    del metadata["qwen3next.attention.recurrent_layers"]
    for layer in range(3):
        qkv, gate = (tensors.pop(f"blk.{layer}.attn_{part}.weight") for part in ("qkv", "gate"))
        parts = (np.frombuffer(data, "<f4").reshape(shape) for _, shape, data in (qkv, gate))
        qkv_rows, z = parts
        q, k, v = np.split(qkv_rows, [64, 128])
        grouped = np.concatenate([x.reshape(2, -1, 128) for x in (q, k, v, z)], 1).reshape(-1, 128)
        tensors[f"blk.{layer}.ssm_in.weight"] = "F32", grouped.shape, grouped.tobytes()


def with_fused_experts(metadata: dict[str, Any], tensors: Tensors) -> None:
    for layer in range(4):
        gate, up = (tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        both = np.concatenate([np.frombuffer(data, "<f4").reshape(shape) for _, shape, data in (gate, up)], 1)
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = "F32", both.shape, both.tobytes()


def nothing(metadata: dict[str, Any], tensors: Tensors) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen35", nothing),
        ("next", as_old_files_do),
        ("qwen35-moe", with_fused_experts),
    ],
)
def test_other_styles_are_read_as_the_checkpoint(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any], Tensors], object]
) -> None:
    equal(
        Checkpoint(rewritten(name, tmp_path / "x.gguf", change)),
        Checkpoint(hybrid_checkpoint(name, tmp_path / "checkpoint")),
    )


def equal(found: Checkpoint, want: Checkpoint) -> None:
    """Whether two checkpoints are the same model."""
    assert found.config == want.config
    assert found.tensors.keys() == want.tensors.keys()
    for key, tensor in want.tensors.items():
        one = found.tensors[key]
        assert one.shape == tensor.shape
        np.testing.assert_array_equal(one.floats(0, one.shape[0]), tensor.floats(0, one.shape[0]), key)
        if len(one.shape) == 2:
            np.testing.assert_array_equal(one.floats(3, 1), tensor.floats(3, 1), key)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_draft_layer_is_that_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    found = Checkpoint(rewritten(name, tmp_path / "x.gguf", partial(with_draft, name)))
    assert not found.leaves_draft
    equal(found, Checkpoint(hybrid_checkpoint(f"{name}+draft", tmp_path / "checkpoint")))


def test_a_draft_layer_without_a_final_norm_has_the_models(tmp_path: Path) -> None:
    """As in llama.cpp."""

    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        with_draft("qwen35", metadata, tensors)
        del tensors["blk.4.nextn.shared_head_norm.weight"]

    found = Checkpoint(rewritten("qwen35", tmp_path / "x.gguf", change)).tensors
    own, models = (found[name].floats(0, 128) for name in ("mtp.norm.weight", "model.norm.weight"))
    np.testing.assert_array_equal(own, models)


def own_embedding(metadata: dict[str, Any], tensors: Tensors) -> None:
    with_draft("qwen35", metadata, tensors)
    tensors["blk.4.nextn.embed_tokens.weight"] = tensors["token_embd.weight"]


@pytest.mark.parametrize("change", [partial(with_draft, "qwen35", layers=2), own_embedding])
def test_other_draft_layers_are_left_out_and_said(
    tmp_path: Path, change: Callable[[dict[str, Any], Tensors], object]
) -> None:
    path = rewritten("qwen35", tmp_path / "x.gguf", change)
    equal(Checkpoint(path), Checkpoint(hybrid_checkpoint("qwen35", tmp_path / "checkpoint")))
    notices: list[str] = []
    convert(path, tmp_path / "out", notice=notices.append)
    assert notices[0].startswith("the file's draft layers (MTP) are left out")


def test_an_incomplete_draft_layer_is_refused(tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        with_draft("qwen35", metadata, tensors)
        del tensors["blk.4.nextn.enorm.weight"]

    path = rewritten("qwen35", tmp_path / "x.gguf", change)
    with pytest.raises(CheckpointError, match=r"has no tensor mtp\.pre_fc_norm_embedding\.weight"):
        convert(path, tmp_path / "out", 8)


def of_another_shape(part: str) -> Callable[[dict[str, Any], Tensors], object]:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        kind, shape, data = tensors[f"blk.1.{part}"]
        size = 4 * int(np.prod(shape[1:]))
        tensors[f"blk.1.{part}"] = kind, (shape[0] - 1, *shape[1:]), data[:-size]

    return change


def entry(key: str, value: Any) -> Callable[[dict[str, Any], Tensors], object]:
    return lambda metadata, tensors: metadata.update({f"qwen35.{key}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("ssm.state_size", []), "does not give qwen35.ssm.state_size"),
        (entry("ssm.time_step_rank", 3), "ssm.inner_size 128 is not that of 3 heads"),
        (entry("ssm.time_step_rank", 0), "ssm.inner_size 128 is not that of 0 heads"),
        (entry("ssm.group_count", 3), "linear_num_value_heads 4 is not a multiple of linear_num_key_heads 3"),
        (entry("ssm.group_count", 0), "linear_num_key_heads is 0"),
        (entry("ssm.conv_kernel", 3), "linear_conv_kernel_dim 3 is not supported"),
        (entry("attention.recurrent_layers", bools([True, False])), "must name linear_attention or full_attention"),
        (entry("full_attention_interval", "4"), None),  # the list counts
        (entry("rope.dimension_count", 64), "partial_rotary_factor 2 of head_dim 32"),
        (entry("nextn_predict_layers", 4), "num_hidden_layers is 0"),
        (entry("nextn_predict_layers", struct.pack("<Ii", 5, -1)), "nextn_predict_layers is -1"),
        *(
            (of_another_shape(part), re.escape(f"but config.json says [{rows}"))
            for part, rows in (
                ("attn_qkv.weight", 256),
                ("attn_gate.weight", 128),
                ("ssm_alpha.weight", 4),
                ("ssm_conv1d.weight", 256),
                ("ssm_a", 4),
                ("ssm_dt.bias", 4),
                ("ssm_out.weight", 128),
                ("ssm_norm.weight", 32),
            )
        ),
        (lambda metadata, tensors: tensors.pop("blk.1.ssm_a"), "has no tensor model.layers.1.linear_attn.decay"),
        (
            lambda metadata, tensors: tensors.update({"blk.1.ssm_x.weight": tensors["blk.1.attn_norm.weight"]}),
            "has a tensor blk.1.ssm_x.weight",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], Tensors], object], message: str | None
) -> None:
    path = rewritten("qwen35", tmp_path / "x.gguf", change)
    if message is None:
        assert Checkpoint(path).tensors
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(path, tmp_path / "out", 8)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
