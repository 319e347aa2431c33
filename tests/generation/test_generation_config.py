"""A checkpoint's generation_config.json, and the defaults of missing keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npqwen.errors import CheckpointError
from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.sampling import Sampling


def write_generation(tmp_path: Path, generation: dict[str, Any] | None, eos: Any = 7) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


@pytest.mark.parametrize(
    ("generation", "eos_ids", "sampling"),
    [
        (None, {7}, Sampling(0.6, 20, 0.95)),
        ({}, {7}, Sampling(0.0, 50)),
        ({"eos_token_id": 3}, {3}, Sampling(0.0, 50)),
        ({"eos_token_id": [3, 4], "do_sample": True}, {3, 4}, Sampling(1.0, 50)),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {7}, Sampling(0.0, 20)),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": None, "repetition_penalty": 1.05},
            {7},
            Sampling(0.7, 50, 0.8, repetition_penalty=1.05),
        ),
    ],
)
def test_generation_config(tmp_path: Path, generation: Any, eos_ids: set[int], sampling: Sampling) -> None:
    found = GenerationConfig.from_directory(write_generation(tmp_path, generation))
    assert found == GenerationConfig(frozenset(eos_ids), sampling)


@pytest.mark.parametrize(
    "generation", [{"eos_token_id": "x"}, {"eos_token_id": [1, None]}, {"do_sample": True, "top_p": 7}]
)
def test_a_bad_generation_config_is_named(tmp_path: Path, generation: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: (eos_token_id|top_p) is"):
        GenerationConfig.from_directory(write_generation(tmp_path, generation))
