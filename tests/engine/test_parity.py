"""The engine's logits against transformers, against the NumPy oracle for many shapes, and the damage of quantizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, make_config, read_safetensors, shapes, write_checkpoint
from converted import small_model
from divergence import divergence
from npqwen_quant import convert
from quantized import QuantizedReference
from reference import ReferenceModel

from npqwen.format.config import Config
from npqwen.model import Model, load

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "tiny-qwen3.npz")
# ggml's Q8_0 and Q4_0 on the same model and text, matrix inputs in int8 too, no importance matrix.
# Of Q8_0, and of IQ4_XS with an embedding of 6 bits, which loses 0.00062.
GGML_BITS_PER_WEIGHT = {8: 8.5, 4: 4.73}
GGML_DIVERGENCE = {8: 0.000015, 4: 0.0006}

PROMPTS = pytest.mark.parametrize("k", range(4))


@pytest.fixture(scope="module")
def models(tiny: Callable[[int], Path]) -> Iterator[dict[int, Model]]:
    """The example model by bits, with the cache that the oracles have: float32 at 16 bits, otherwise float16."""
    loaded = {bits: load(tiny(bits), threads=2, kv="f32" if bits == 16 else "f16") for bits in (16, 8, 4)}
    yield loaded
    for model in loaded.values():
        model.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def in_passes(model: Model, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Every token's logits, run in passes of these sizes and a last one for the rest."""
    cache = model.new_cache()
    parts = np.split(ids, np.cumsum(sizes))
    out = np.concatenate([model.forward(part, cache, all_logits=True) for part in parts if len(part)])
    assert cache.length == len(ids)
    return out


@PROMPTS
@pytest.mark.parametrize(
    "sizes", [[], [1] * 60, [2, 1, 3, 5], [17]], ids=["whole", "single", "ragged", "two"]
)
def test_logits_of_transformers(models: dict[int, Model], k: int, sizes: list[int]) -> None:
    found = in_passes(models[16], GOLDEN[f"ids_{k}"], sizes)
    assert np.abs(found - GOLDEN[f"logits_{k}"]).max() < 1e-3


@PROMPTS
def test_greedy_continuation_of_transformers(models: dict[int, Model], k: int) -> None:
    cache = models[16].new_cache()
    logits = models[16].prefill(GOLDEN[f"ids_{k}"], cache)
    found = []
    for _ in range(48):
        found.append(int(logits.argmax()))
        logits = models[16].forward(found[-1:], cache)[0]
    assert found == GOLDEN[f"greedy_{k}"].tolist()


def test_perplexity_of_transformers_and_divergence_of_ggml(
    models: dict[int, Model], tiny: Callable[[int], Path]
) -> None:
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    found = {bits: divergence(models[16], models[bits], text).total for bits in (8, 4)}
    compared = found[8].divergence
    assert compared is not None
    assert found[8].tokens == GOLDEN["heldout_tokens"]
    assert compared.base_nll.mean == pytest.approx(float(GOLDEN["heldout_nll"]), abs=1e-5)
    weights = sum(
        math.prod(shape) for shape in shapes(Config.from_directory(TINY).__dict__).values() if len(shape) > 1
    )
    for bits in (8, 4):
        stored = read_safetensors(tiny(bits) / "model.safetensors").values()
        assert 8 * sum(t.size for t in stored if t.dtype == np.uint8) / weights <= GGML_BITS_PER_WEIGHT[bits]
        compared = found[bits].divergence
        assert compared is not None
        assert compared.kl.mean <= GGML_DIVERGENCE[bits]


@pytest.mark.parametrize(("bits", "most"), [(16, 5e-5), (8, 1e-4), (4, 1e-4)])
def test_what_an_int8_cache_loses(models: dict[int, Model], bits: int, most: float) -> None:
    """KL divergence at 2,048 tokens. With rounded activations, any difference flips some of these: f16 loses 1.6e-5."""
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    ids = models[bits].tokenizer.encode(text)[:2048]
    expected = log_softmax(models[bits].logits(ids).astype(np.float64))
    with load(models[bits].path, threads=2, kv="int8") as rounded:
        found = log_softmax(rounded.logits(ids).astype(np.float64))
    assert 0 < (np.exp(expected) * (expected - found)).sum(1).mean() < most


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_of_the_quantized_oracle(models: dict[int, Model], bits: int) -> None:
    """The oracle rounds activations and cache as the engine does, but sums in another order.

    Now and then that brings an activation to the other side of a rounding step; other tokens agree exactly.
    """
    oracle = QuantizedReference.from_directory(models[bits].path)
    found = [np.abs(models[bits].logits([i]) - oracle.logits([i])).max() for i in range(0, 4096, 64)]
    assert np.quantile(found, 0.4) < 1e-5
    assert max(found) < 0.4


@PROMPTS
@pytest.mark.parametrize("bits", [4, 8])
def test_prompts_of_the_quantized_oracle(models: dict[int, Model], k: int, bits: int) -> None:
    """In a prompt every token sees such a step; what it costs stays far below what quantizing costs."""
    oracle = QuantizedReference.from_directory(models[bits].path)
    ids = GOLDEN[f"ids_{k}"]
    expected = log_softmax(oracle.logits(ids))
    kl = (np.exp(expected) * (expected - log_softmax(models[bits].logits(ids)))).sum(1)
    assert kl.mean() < 5e-4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hub style": ("hub", {}),
    "transformers 5 style": ("v5", {}),
    "odd sizes": ("hub", {"hidden_size": 80, "intermediate_size": 100, "vocab_size": 203}),
    "smallest": (
        "hub",
        {"hidden_size": 8, "intermediate_size": 1, "vocab_size": 17, "head_dim": 16, "num_hidden_layers": 1},
    ),
    "a head each": (
        "hub",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 40},
    ),
    "group of 3": ("v5", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 48}),
    "group of 5": ("hub", {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 16}),
    "group of 16": ("hub", {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 128}),
    "untied": ("hub", {"tie_word_embeddings": False, "vocab_size": 130}),
    "rope_theta": ("hub", {"rope_theta": 5000000}),
    "rope_theta v5": ("v5", {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}),
    "eps": ("hub", {"rms_norm_eps": 1e-2}),
    "YaRN": ("hub", {"rope_scaling": YARN}),
    "YaRN v5": ("v5", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "YaRN in detail": (
        "hub",
        {
            "rope_scaling": {
                **YARN,
                "attention_factor": 1.3,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": False,
            }
        },
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_the_oracle_for_other_shapes(name: str, tmp_path: Path) -> None:
    style, changes = CHECKPOINTS[name]
    config = make_config(style, **changes)
    tensors = write_checkpoint(tmp_path / "checkpoint", config, tokenizer=True)
    convert(tmp_path / "checkpoint", tmp_path / "out", bits=16)
    oracle = ReferenceModel(Config.from_dict(config), tensors)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 150)
    expected = oracle.logits(ids)
    with load(tmp_path / "out", threads=2) as model:
        assert np.abs(model.logits(ids) - expected).max() < 2e-4 * np.abs(expected).max()
        assert np.abs(in_passes(model, ids, [1, 1, 7, 70]) - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["odd sizes", "smallest", "group of 3", "untied"])
def test_logits_of_the_oracle_for_other_quantized_shapes(name: str, bits: int, tmp_path: Path) -> None:
    path = small_model(tmp_path / "model", bits, **CHECKPOINTS[name][1])
    oracle = QuantizedReference.from_directory(path)
    ids = np.random.default_rng(0).integers(0, oracle.config.vocab_size, 70)
    expected = oracle.logits(ids)
    with load(path, threads=2) as model:
        difference = np.abs(model.logits(ids) - expected)
        assert difference.max() < 0.05 * np.abs(expected).max()
        assert difference.mean() < 0.005 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_cached_decoding_is_one_full_pass_to_the_bit(bits: int, tiny: Callable[[int], Path]) -> None:
    """Whatever the number of tokens a pass, every sum is added up in the same order."""
    ids = np.random.default_rng(3).integers(0, 4096, 150)
    with load(tiny(bits), threads=2) as model:
        full = model.logits(ids)
        cache = model.new_cache()
        ends = [1, 2, 5, 9, 40, 41, 70, 150]
        pieces = [
            model.forward(ids[a:b], cache, all_logits=True) for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]
        assert np.array_equal(np.concatenate(pieces), full)
        cache.truncate(0)
        assert np.array_equal(np.concatenate([model.forward([id], cache) for id in ids]), full)
