"""What llama.cpp makes of a hybrid's tensors: all, once each. Their values: tests/quant/test_gguf_hybrids.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hybrid_tensors import targets
from make_checkpoint import SIZES, tensors

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": 256,
}
DENSE = SIZES["3.5-4B"] | SMALL
MIXTURE = SIZES["3.5-35B-A3B"] | SMALL | {"num_experts": 8, "moe_intermediate_size": 32}


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_every_tensor_of_a_random_checkpoint_has_one_place(config: dict[str, Any]) -> None:
    stored = dict(tensors(config))
    found = [target for name, shape in stored.items() for target in targets(name, shape, config)]
    assert len({(target.name, target.expert) for target in found}) == len(found) == len(stored)
    for name, shape in stored.items():
        for target in targets(name, shape, config):
            assert target.made(np.ones(shape, np.float32)).shape == target.shape


def test_matrices_keep_their_type_of_elements() -> None:
    for name, shape in tensors(DENSE):
        if len(shape) == 2:
            values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
            (made,) = (target.made(values) for target in targets(name, shape, DENSE))
            assert made.dtype == np.uint16
            np.testing.assert_array_equal(np.sort(made, None), np.sort(values, None))


def test_the_draft_layer_and_images_are_left_out_and_others_refused() -> None:
    drafted = dict(tensors(DENSE | {"mtp_num_hidden_layers": 1}))
    assert not [name for name, shape in drafted.items() if name.startswith("mtp.") and targets(name, shape, DENSE)]
    assert not targets("model.visual.pos_embed.weight", (4, 4), DENSE)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.x\.weight is not a tensor of a hybrid"):
        targets("model.layers.0.x.weight", (4, 4), DENSE)
