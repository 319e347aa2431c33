"""Models in GGUF: what llama.cpp writes, shards, mixtures, every format, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, TINY, write_checkpoint
from gguf_files import (
    LLAMA,
    MOE,
    QUANTIZED,
    VOCABULARY,
    Tensors,
    config,
    encode,
    metadata,
    plain,
    quantized,
    rebuilt,
    write,
    write_shards,
)
from npqwen_quant import convert
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.gguf import GgufModel, gguf_files

import npqwen
from npqwen.chat.template_files import TemplateFiles
from npqwen.errors import CheckpointError
from npqwen.format.config import Config
from npqwen.generation.generation_config import GenerationConfig
from npqwen.tokenizer import Tokenizer

PROMPTS = np.load(TINY.parents[1] / "tests" / "data" / "tiny-qwen3.npz")
TEXTS = [
    "Hello, world! 12345  \r\n\t it's WE'LL",
    "naïve e\u0301 Ⅷ ﬁ 汉字 \U0001f600\u200d",
    "<|im_start|>user\n<think>x</think><|fim_prefix|><tool_call><|im_end|>",
    "def f(x):\n    return x ** 2\n\n\n",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama.cpp's files of the tiny models."""
    place = tmp_path_factory.mktemp("gguf")
    return {name: rebuilt(name, place) for name in ("tiny-qwen3", "tiny-qwen3-moe")}


@pytest.fixture(scope="module")
def dense(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's F16 file with 16 bits."""
    out = tmp_path_factory.mktemp("converted") / "dense"
    convert(files["tiny-qwen3"], out, 16)
    return out


def test_greedy_text_is_that_of_llama_cpp(dense: Path) -> None:
    with npqwen.load(dense, threads=1) as model:
        for k in range(4):
            expected = LLAMA[f"greedy_{k}"].tolist()
            ends = [i + 1 for i, id in enumerate(expected) if id in model.generation_config.eos_ids]
            found = model.generate(PROMPTS[f"ids_{k}"].tolist(), temperature=0, max_tokens=48)
            assert found.ids == expected[: min(ends, default=48)]


def test_logits_are_those_of_the_checkpoint(dense: Path, tiny: Callable[[int], Path]) -> None:
    """But for weights too small for F16, which llama.cpp rounded."""
    with npqwen.load(dense, threads=1) as model, npqwen.load(tiny(16), threads=1) as original:
        for k in range(4):
            ids = PROMPTS[f"ids_{k}"].tolist()
            assert np.abs(model.logits(ids) - original.logits(ids)).max() < 1e-4


def test_a_mixture_in_bf16_is_its_checkpoint_to_the_byte(files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["tiny-qwen3-moe"], tmp_path / "gguf", 16)
    convert(MOE, tmp_path / "original", 16)
    found, original = (tmp_path / name / "model.safetensors" for name in ("gguf", "original"))
    assert found.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(("name", "checkpoint"), [("tiny-qwen3", TINY), ("tiny-qwen3-moe", MOE)])
def test_tokenizer_template_and_defaults_are_the_checkpoints(
    name: str, checkpoint: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    model = GgufModel([files[name]])
    for file in model.small_files:
        (tmp_path / file.name).write_bytes(file.read())
        assert file.nbytes == (tmp_path / file.name).stat().st_size
    (tmp_path / "config.json").write_text(json.dumps(model.raw_config))
    assert json.loads((tmp_path / "tokenizer.json").read_bytes()) == json.loads(
        (checkpoint / "tokenizer.json").read_bytes()
    )
    ours, theirs = Tokenizer.from_directory(tmp_path), Tokenizer.from_directory(checkpoint)
    assert ours.special_ids == theirs.special_ids
    for text in [*TEXTS, (TINY / "heldout.txt").read_text()[:20_000]]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert TemplateFiles.from_directory(tmp_path) == TemplateFiles.from_directory(checkpoint)
    assert GenerationConfig.from_directory(tmp_path) == GenerationConfig.from_directory(checkpoint)
    assert Config.from_dict(model.raw_config) == Config.from_directory(checkpoint)


def convert_both(tmp_path: Path, tensors: Tensors, floats: dict[str, np.ndarray], small: dict[str, Any]) -> None:
    """Convert a GGUF file and a checkpoint of the same weights; the results must be equal."""
    (tmp_path / "x.gguf").write_bytes(encode(metadata(small), tensors))
    write_checkpoint(tmp_path / "original", small, tensors=floats, dtype="F32")
    for bits in (8, 16):
        convert(tmp_path / "x.gguf", tmp_path / f"{bits}", bits)
        convert(tmp_path / "original", tmp_path / f"o{bits}", bits)
        found, expected = (tmp_path / name / "model.safetensors" for name in (f"{bits}", f"o{bits}"))
        assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_format_converts_as_the_weights_that_ggml_finds_in_it(kind: str, tmp_path: Path) -> None:
    small = config(num_hidden_layers=1)
    tensors, floats = quantized(kind, small)
    convert_both(tmp_path, tensors, floats, small)
    assert GgufModel([tmp_path / "x.gguf"]).kinds == [kind]
    assert GgufModel([tmp_path / "x.gguf"]).quantized


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats(kind: str, tmp_path: Path) -> None:
    small = config(tie_word_embeddings=False)
    tensors, floats = plain(small, kind)
    if kind == "F16":
        floats = {name: v if v.ndim == 1 else v.astype("<f2").astype("<f4") for name, v in floats.items()}
    convert_both(tmp_path, tensors, floats, small)
    assert not GgufModel([tmp_path / "x.gguf"]).quantized


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_mixtures_with_a_dense_layer(kind: str, tmp_path: Path) -> None:
    small = config(**MIXTURE | {"moe_intermediate_size": 256, "num_experts": 5})
    tensors, floats = quantized(kind, small)
    convert_both(tmp_path, tensors, floats, small)
    found = Config.from_directory(tmp_path / "8")
    assert found.mixture is not None
    assert found.mixture.mlp_only_layers == (0,)


def test_shards_are_one_model_whichever_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    paths = write_shards(tmp_path / "shards")
    write(tmp_path / "whole.gguf")
    (tmp_path / "shards" / "mmproj-F16.gguf").write_bytes(b"GGUF")
    (tmp_path / "shards" / "imatrix.gguf").write_bytes(b"GGUF")
    convert(tmp_path / "whole.gguf", tmp_path / "whole", 8)
    for i, source in enumerate([*paths, tmp_path / "shards"]):
        convert(source, tmp_path / f"{i}", 8)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / f"{i}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    for source in (paths[0], paths[2], tmp_path):
        with pytest.raises(CheckpointError, match=r"small-00002-of-00003.gguf is missing, one of 3 shards"):
            Checkpoint(source)


def test_shards_that_were_renamed(tmp_path: Path) -> None:
    first, second, _ = write_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"alone.gguf says that it is shard 1 \(counted from 0\) of 3, but"):
        Checkpoint(second.rename(tmp_path / "alone.gguf"))
    (tmp_path / "alone.gguf").write_bytes(first.read_bytes())
    (tmp_path / "alone.gguf").rename(second)
    with pytest.raises(CheckpointError, match=r"small-00002-of-00003.gguf says that it is shard 0"):
        Checkpoint(first)


def test_a_shard_of_another_model(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    split = {"split.no": struct.pack("<IH", 2, 2), "split.count": struct.pack("<IH", 2, 3)}
    paths[2].write_bytes(encode(split, {}))
    with pytest.raises(CheckpointError, match=r"its other shards have 9 of 13 tensors"):
        Checkpoint(paths[0])


def test_a_directory_of_several_models(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds several GGUF files, a.gguf, b.gguf; name one of them"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert gguf_files(tmp_path) == []


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert gguf_files(tmp_path) == []


def test_a_file_without_a_suffix_is_known_by_its_content(tmp_path: Path) -> None:
    """As those of ollama's cache."""
    assert Checkpoint(write(tmp_path / "sha256-0123")).config.hidden_size == 256


def test_a_file_that_is_changed_or_cut_while_it_is_converted(tmp_path: Path) -> None:
    for i, damage in enumerate((lambda p: p.write_bytes(p.read_bytes()[:-5000]), lambda p: p.write_bytes(b""))):
        path = write(tmp_path / f"{i}.gguf")

        def harm(done: int, total: int, path: Path = path, damage: Callable[[Path], object] = damage) -> None:
            if not done:
                damage(path)

        with pytest.raises(CheckpointError, match=r"became shorter while it was read|changed while it was converted"):
            convert(path, tmp_path / "out", 8, threads=1, progress=harm)
        assert not (tmp_path / "out").exists()


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general__architecture": "llama"}, "the architecture 'llama'; npqwen reads qwen3, "),
    "a projector": ({"general__architecture": "clip"}, "has the architecture 'clip'"),
    "no architecture": ({"general__architecture": None}, "names no architecture"),
    "a number for the architecture": ({"general__architecture": 3}, "has the architecture 3"),
    "a list for the architecture": ({"general__architecture": [1, 2]}, r"has the architecture \[1, 2\]"),
    "no layers": ({"qwen3__block_count": None}, "does not give qwen3.block_count"),
    "text for layers": ({"qwen3__block_count": "1"}, "qwen3.block_count is '1', a value of the wrong type"),
    "0 layers": ({"qwen3__block_count": 0}, "num_hidden_layers is 0"),
    "too many layers": ({"qwen3__block_count": 2**31}, "too few for the layers"),
    "0 heads": ({"qwen3__attention__head_count": 0}, "num_attention_heads is 0"),
    "heads by layer": ({"qwen3__attention__head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\], a value of the wrong"),
    "other values": ({"qwen3__attention__value_length": 64}, "qwen3.attention.value_length is 64, but keys have 32"),
    "part of a rotation": ({"qwen3__rope__dimension_count": 16}, "qwen3.rope.dimension_count is 16"),
    "both directions": ({"qwen3__attention__causal": False}, "attends in both directions"),
    "NaN": ({"qwen3__rope__freq_base": float("nan")}, "rope_theta is nan"),
    "an epsilon of 0": ({"qwen3__attention__layer_norm_rms_epsilon": 0.0}, "rms_norm_eps is 0.0"),
    "another scaling": (
        {"qwen3__rope__scaling__type": "linear", "qwen3__rope__scaling__factor": 4.0},
        "rope type 'linear'",
    ),
    "an odd factor": (
        {"qwen3__rope__scaling__type": "yarn", "qwen3__rope__scaling__attn_factor": 2.0},
        "attn_factor is not supported",
    ),
    "a hot temperature": ({"general__sampling__temp": float("inf")}, "general.sampling.temp is inf"),
    "another tokenizer": ({"tokenizer__ggml__model": "llama"}, "the tokenizer 'llama' with 'qwen2'; Qwen3's is 'gpt2'"),
    "another pre-tokenizer": ({"tokenizer__ggml__pre": "gpt-4o"}, "the tokenizer 'gpt2' with 'gpt-4o'"),
    "no tokens": ({"tokenizer__ggml__tokens": None}, "has 0 tokens and 110 token types"),
    "no types": ({"tokenizer__ggml__token_type": None}, "has 110 tokens and 0 token types"),
    "numbers for tokens": ({"tokenizer__ggml__tokens": [1] * VOCABULARY}, "tokens of the wrong type"),
    "more tokens than rows": (
        {"tokenizer__ggml__tokens": ["x"] * 111, "tokenizer__ggml__token_type": [5] * 111},
        "has 111 tokens, but an embedding of 110",
    ),
    "a token twice": (
        {"tokenizer__ggml__tokens": ["x"] * 110, "tokenizer__ggml__token_type": [1] * 110},
        "the token 'x' twice",
    ),
    "an added token twice": (
        {"tokenizer__ggml__tokens": ["x"] * 110, "tokenizer__ggml__token_type": [3] * 110},
        "an added token twice",
    ),
    "a token without text": ({"tokenizer__ggml__tokens": [""] * 110}, "a token without text"),
    "a token of bytes": ({"tokenizer__ggml__token_type": [6] * 110}, "a token of type 6"),
    "a merge of one": ({"tokenizer__ggml__merges": ["ab"]}, "the merge 'ab', which does not join"),
    "a merge of three": ({"tokenizer__ggml__merges": ["a b c"]}, "the merge 'a b c'"),
    "a merge to nothing": ({"tokenizer__ggml__merges": ["a c"]}, "the merge 'a c'"),
    "an end beyond the tokens": ({"tokenizer__ggml__eos_token_id": 999}, "eos_token_id 999, beyond its 110 tokens"),
    "a template of numbers": ({"tokenizer__chat_template": 1}, "tokenizer.chat_template is 1, a value of the wrong"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_metadata_of_no_qwen3_model_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = ENTRIES[case]
    path = write(tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(path, tmp_path / "out", 8)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no embedding": (lambda t: t.pop("token_embd.weight"), "has no tensor token_embd.weight"),
    "a missing matrix": (lambda t: t.pop("blk.0.ffn_up.weight"), "has no tensor model.layers.0.mlp.up_proj.weight"),
    "a bias": (lambda t: t.update({"blk.0.attn_q.bias": t["blk.0.attn_norm.weight"]}), "a tensor blk.0.attn_q.bias"),
    "frequencies": (lambda t: t.update({"rope_freqs.weight": t["blk.0.attn_norm.weight"]}), "rope_freqs.weight"),
    "a reranker": (lambda t: t.update({"cls.output.weight": t["blk.0.attn_norm.weight"]}), "cls.output.weight"),
    "a layer too many": (lambda t: t.update({"blk.1.attn_norm.weight": t["blk.0.attn_norm.weight"]}), "layers.1.input"),
    "a name by another name": (
        lambda t: t.update({"model.norm.weight": t["output_norm.weight"]}),
        "has model.norm.weight twice, under two names",
    ),
    "experts in a dense model": (
        lambda t: t.update({"blk.0.ffn_up_exps.weight": ("F32", (2, 1, 32), bytes(256))}),
        "layers.0.mlp.experts.0.up_proj.weight",
    ),
    "too many experts": (
        lambda t: t.update({"blk.0.ffn_up_exps.weight": ("F32", (5000, 1, 1), bytes(20_000))}),
        "has 5000 experts",
    ),
    "a vector in blocks": (
        lambda t: t.update({"output_norm.weight": ("Q8_0", (256,), bytes(8 * 34))}),
        "the vector model.norm.weight is stored as Q8_0, a format for matrices",
    ),
    "a transposed matrix": (
        lambda t: t.update({"blk.0.attn_k.weight": ("F32", (256, 64), bytes(65536))}),
        r"k_proj.weight has shape \[256, 64\]",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors_are_refused(case: str, tmp_path: Path) -> None:
    damage, message = TENSORS[case]
    small = config(num_hidden_layers=1)
    tensors = plain(small)[0]
    damage(tensors)
    (tmp_path / "x.gguf").write_bytes(encode(metadata(small), tensors))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.gguf", tmp_path / "out", 8)


def test_yarn_and_sampling_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.gguf",
        qwen3__rope__scaling__type="yarn",
        qwen3__rope__scaling__factor=4.0,
        qwen3__rope__scaling__original_context_length=64,
        qwen3__rope__scaling__yarn_beta_fast=16.0,
        general__sampling__temp=0.7,
        general__sampling__top_k=30,
        general__sampling__penalty_repeat=1.05,
    )
    convert(path, tmp_path / "out", 8)
    yarn = Config.from_directory(tmp_path / "out").yarn
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) == (4, 64, 16, 1)
    found = GenerationConfig.from_directory(tmp_path / "out")
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.repetition_penalty) == (0.7, 30, 1.05)
    assert found.eos_ids == {98, 99}


def test_without_sampling_the_familys_defaults_hold(tmp_path: Path) -> None:
    convert(write(tmp_path / "x.gguf"), tmp_path / "out", 8)
    found = GenerationConfig.from_directory(tmp_path / "out")
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.top_p) == (0.6, 20, 0.95)
    assert found.eos_ids == {98, 99}


def test_named_templates(tmp_path: Path) -> None:
    texts = {"tokenizer__chat_template__tool_use": "{{ 1 }}", "tokenizer__chat_templates": ["tool_use"]}
    convert(write(tmp_path / "x.gguf", **texts), tmp_path / "out", 8)
    found = TemplateFiles.from_directory(tmp_path / "out").sources
    assert found == {"default": "{% for m in messages %}{{ m.content }}{% endfor %}", "tool_use": "{{ 1 }}"}


@pytest.mark.parametrize("begins", [True, False])
def test_templates_see_a_first_token_only_if_texts_begin_with_it(begins: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tokenizer__ggml__bos_token_id=98, tokenizer__ggml__add_bos_token=begins)
    convert(path, tmp_path / "out", 8)
    tokens = TemplateFiles.from_directory(tmp_path / "out").special_tokens
    assert tokens.get("bos_token") == ("<|endoftext|>" if begins else None)
    assert (tokens["eos_token"], tokens["pad_token"]) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.skipif(sys.platform != "linux", reason="no peak of memory to ask for that begins with the program")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """An embedding of 154 MB in float32 is dequantized and converted in a fraction of its size."""
    small = config(num_hidden_layers=1)
    tensors, _ = quantized("Q6_K", small)
    write(tmp_path / "small.gguf")
    blocks = np.resize(LLAMA["Q6_K.blocks"], (150_000, 210))
    tensors["token_embd.weight"] = "Q6_K", (150_000, 256), blocks.tobytes()
    (tmp_path / "large.gguf").write_bytes(encode(metadata(small), tensors))
    code = f"""
from pathlib import Path
from npqwen_quant import convert
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
place = Path({str(tmp_path)!r})
convert(place / "small.gguf", place / "small", 8, threads=2)
before = peak()
convert(place / "large.gguf", place / "large", 8, threads=2)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 70_000  # kB
