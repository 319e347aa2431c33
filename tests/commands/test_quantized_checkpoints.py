"""Commands on checkpoints that are quantized already, or multimodal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_checkpoint
from fake_hub import FakeHub
from quantizers import bitsandbytes, example, fp8, gptq, nvfp4, write_quantized
from reference import ReferenceModel

import npqwen
from npqwen.errors import CheckpointError
from npqwen.format.config import Config
from npqwen.hub.source import LocalSource
from npqwen.hub.support import check

Run = Callable[..., tuple[str, str]]
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16}
TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT[:1500], encoding="utf-8")
    return tmp_path / "text.txt"


def quantized(directory: Path, entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """Write the example model in a format, and return what its tensors mean."""
    config, tensors = example()
    config["quantization_config"] = entry
    return write_quantized(directory, config, tensors, fp8 if entry is FP8 else gptq, tokenizer=True)


@pytest.mark.parametrize(("entry", "name"), [(FP8, "FP8"), (GPTQ, "GPTQ, 4 bits")])
def test_it_is_said_and_measured_against_the_source(
    run: Run, tmp_path: Path, text: Path, entry: dict[str, Any], name: str
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    meant = quantized(source, entry)
    _, err = run("convert", source, out, "--evaluate", text)
    assert f"{source} is quantized already ({name}); quantizing it again adds error, which npqwen convert " in err
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["evaluation"]
    assert kept["against"] == "the checkpoint"
    # The same divergence, from the weights that the source means.
    exact = ReferenceModel(Config.from_directory(source), meant)
    with npqwen.load(out, threads=1) as model:
        ids = np.array(model.tokenizer.encode(text.read_text())[: kept["tokens"] + 1])
        p, q = (logits - np.log(np.exp(logits).sum(1, keepdims=True)) for logits in (
            exact.logits(ids).astype(np.float64), model.logits(ids).astype(np.float64)))  # fmt: skip
        divergences = (np.exp(p) * (p - q)).sum(1)[:-1]
    assert kept["kl_divergence"] == pytest.approx(np.mean(divergences), rel=1e-2)
    _, err = run("convert", source, tmp_path / "exact", "--bits", "16")
    assert "quantized already" not in err


def test_from_the_hub(run: Run, tmp_path: Path, fake_hub: FakeHub, cache: Path) -> None:
    quantized(tmp_path / "in", FP8)
    fake_hub.publish("Qwen/Qwen3-0.6B-FP8", tmp_path / "in")
    out, err = run("generate", "Qwen3-0.6B-FP8", "What is", "--temperature", "0", "--max-tokens", "4")
    assert out
    assert "Qwen/Qwen3-0.6B-FP8 is quantized already (FP8)" in err
    out, err = run("pull", "Qwen3-0.6B-FP8", "--bits", "8", "--low-disk")
    assert "Qwen/Qwen3-0.6B-FP8 is quantized already (FP8)" in err
    want, _ = run("convert", tmp_path / "in", tmp_path / "want", "--bits", "8")
    names = ("model.safetensors", "config.json", "npqwen-checksums.json")
    assert [(Path(out.strip()) / name).read_bytes() for name in names] == [
        (Path(want.strip()) / name).read_bytes() for name in names
    ]


def test_modelopt_with_a_file_of_its_own_from_the_hub(
    run: Run, tmp_path: Path, fake_hub: FakeHub, cache: Path
) -> None:
    config, tensors = example()
    write_quantized(tmp_path / "in", config, tensors, lambda w: nvfp4(w, divides=False), tokenizer=True)
    entry = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "in" / "hf_quant_config.json").write_text(json.dumps(entry))
    fake_hub.publish("nvidia/Qwen3-0.6B-NVFP4", tmp_path / "in")
    for bits, *more in (("8",), ("4", "--low-disk")):
        out, err = run("pull", "nvidia/Qwen3-0.6B-NVFP4", "--bits", bits, *more)
        assert "nvidia/Qwen3-0.6B-NVFP4 is quantized already (ModelOpt, NVFP4)" in err
        want, _ = run("convert", tmp_path / "in", tmp_path / f"want{bits}", "--bits", bits)
        files = [(Path(place.strip()) / "model.safetensors").read_bytes() for place in (out, want)]
        assert files[0] == files[1]


def test_bitsandbytes_from_the_hub(run: Run, tmp_path: Path, fake_hub: FakeHub, cache: Path) -> None:
    config, tensors = example()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    write_quantized(tmp_path / "in", config, tensors, lambda w: bitsandbytes(w, double=True), tokenizer=True)
    fake_hub.publish("unsloth/Qwen3-0.6B-bnb-4bit", tmp_path / "in")
    out, err = run("generate", "unsloth/Qwen3-0.6B-bnb-4bit", "What is", "--temperature", "0", "--max-tokens", "4")
    assert out
    assert "unsloth/Qwen3-0.6B-bnb-4bit is quantized already (bitsandbytes, NF4)" in err


def test_gptq_with_a_file_of_its_own_is_accepted_and_has_its_own_conversion(tmp_path: Path) -> None:
    config, tensors = example()
    write_quantized(tmp_path, config, tensors, gptq, tokenizer=True)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    source = LocalSource(tmp_path)
    check(source, "text")
    before = source.weights_digest
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"})
    )
    assert LocalSource(tmp_path).weights_digest != before
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 5}))
    with pytest.raises(CheckpointError, match=r"GPTQ, 5 bits"):
        check(LocalSource(tmp_path), "text")


def test_the_text_part_of_a_multimodal_model(
    run: Run, tmp_path: Path, cache: Path, tiny: Callable[[int], Path]
) -> None:
    config, tensors = example()
    raw = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": True}
    raw["text_config"] = config | {"model_type": "qwen3_vl_text"}
    stored = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    stored["model.visual.pos_embed.weight"] = np.ones((2, 2), np.float32)
    write_checkpoint(tmp_path / "in", raw, stored, tokenizer=True)
    out, err = run("generate", tmp_path / "in", "What is", "--temperature", "0", "--max-tokens", "8")
    assert re.search("in is multimodal; npqwen runs its text part, without images\n", err)
    assert out == run("generate", tiny(4), "What is", "--temperature", "0", "--max-tokens", "8")[0]
