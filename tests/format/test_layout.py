"""The tensors of a model: names, shapes and order, against the tests' own writer and the checkpoint's names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, shapes
from converted import MATRICES, tensors
from make_checkpoint import SIZES
from units import PLANES, unit_bytes

from npqwen.format.config import Config
from npqwen.format.encodings import BF16, ENCODINGS, INT3, INT4, INT5, INT6, INT8, Encoding
from npqwen.format.layout import Codebook, Experts, Layout, Matrix, Vector
from npqwen.format.recipe import RECIPES

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"hidden_size": 200, "intermediate_size": 33, "vocab_size": 17, "head_dim": 16, "num_key_value_heads": 1},
]
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 4,
    "mlp_only_layers": [1],
}


@pytest.mark.parametrize("changes", SHAPES)
def test_names_shapes_and_order(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    found: dict[str, tuple[int, ...]] = {}
    for tensor in Layout(Config.from_dict(config)):
        if isinstance(tensor, Vector):
            found[tensor.name] = tensor.shape
        else:
            codebook = Codebook(tensor.name)
            found |= {codebook.name: codebook.shape, tensor.name: tensor.shape(INT4)}
    expected = {name: value.shape for name, value in tensors(config, dict.fromkeys(MATRICES, 4)).items()}
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("changes", [*SHAPES, MIXTURE])
def test_every_tensor_of_the_checkpoint_has_a_place(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    sources: dict[str, tuple[int, ...]] = {}
    for tensor in Layout(Config.from_dict(config)):
        assert not sources.keys() & tensor.sources.keys()
        sources |= tensor.sources
    assert sources == shapes(config)


@pytest.mark.parametrize("changes", [*SHAPES, MIXTURE])
def test_parts_fill_their_matrix_once(changes: dict[str, Any]) -> None:
    for tensor in Layout(Config.from_dict(make_config(**changes))):
        matrices: list[Matrix] = [tensor] if isinstance(tensor, Matrix) else []
        if isinstance(tensor, Experts):
            matrices = [matrix for expert in range(tensor.count) for matrix in tensor.matrices(expert)]
            assert tensor.shape(BF16) == (5, sum(4096 * int(np.prod(matrix.units)) for matrix in tensor.matrices(3)))
        for matrix in matrices:
            rows = [part.start + i * part.stride for part in matrix.parts for i in range(part.unit_rows)]
            assert sorted(rows) == list(range(matrix.units[0]))
            assert matrix.padded == (16 * matrix.units[0], 128 * matrix.units[1])
            assert matrix.units[1] == -(-matrix.columns // 128)


def test_encodings_are_what_the_format_says() -> None:
    assert {encoding.name: encoding.unit_bytes for encoding in ENCODINGS} == {
        name: unit_bytes(name) for name in ("bf16", *PLANES)
    }
    assert [encoding.code for encoding in ENCODINGS] == list(range(len(ENCODINGS)))
    for encoding in ENCODINGS:
        if encoding.is_integer:
            bits = encoding.bits
            assert len(encoding.values) == (255 if bits == 8 else 1 << bits)
            assert list(encoding.values) == sorted(set(encoding.values))
            assert all(abs(value) <= 127 if bits == 8 else -32 <= value < 32 for value in encoding.values)


@pytest.mark.parametrize("kind", ["dense", "mixture", "hybrid", "hybrid mixture"])
def test_encodings_that_recipes_choose(kind: str) -> None:
    expected: dict[int, dict[str, Encoding]] = {
        3: {"embed_tokens": INT5, "qk_proj": INT3, "v_proj": INT4, "o_proj": INT3, "down_proj": INT4, "mlp": INT3},
        4: {"embed_tokens": INT5, "qk_proj": INT4, "v_proj": INT6, "o_proj": INT4, "down_proj": INT4, "mlp": INT4},
        8: dict.fromkeys(("embed_tokens", "qk_proj", "v_proj", "o_proj", "down_proj", "mlp"), INT8),
        16: dict.fromkeys(("embed_tokens", "qk_proj", "v_proj", "o_proj", "down_proj", "mlp"), BF16),
    }
    for parts in expected.values():
        parts["lm_head"] = parts["embed_tokens"]
    if "mixture" in kind:
        expected[3] |= {"qk_proj": INT4, "v_proj": INT5, "o_proj": INT4}
        expected[4] |= {"qk_proj": INT5, "o_proj": INT5}
    if "hybrid" in kind:
        expected[3] |= dict.fromkeys(("in_proj", "out_proj", "qk_proj"), INT4)
        expected[4] |= dict.fromkeys(("in_proj", "out_proj", "qk_proj"), INT5)
    configs = {
        "dense": make_config(tie_word_embeddings=False),
        "mixture": make_config(**MIXTURE),
        "hybrid": SIZES["3.5-4B"] | {"mtp_num_hidden_layers": 1},
        "hybrid mixture": SIZES["3.5-35B-A3B"] | {"mtp_num_hidden_layers": 1},
    }
    config = Config.from_dict(configs[kind])
    layout = Layout(config)
    for bits, recipe in RECIPES.items():
        assert recipe.bits == bits
        for tensor in layout:
            if isinstance(tensor, Vector):
                continue
            part = tensor.name.removesuffix(".weight").split(".")[-1]
            encoding = recipe.encoding(tensor.name, config)
            if ".shared_expert." in tensor.name:
                assert encoding == {3: INT4, 4: INT5, 8: INT8, 16: BF16}[bits]
            elif tensor.name.endswith((".mlp.gate.weight", ".in_proj_ba.weight")):
                assert encoding == BF16
            else:
                assert encoding == expected[bits].get(part, expected[bits]["mlp"]), tensor.name
