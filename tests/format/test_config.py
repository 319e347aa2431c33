"""`config.json`: its two styles of rope_theta, values out of range, and files that would take much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_config

from npqwen import CheckpointError
from npqwen.format.config import Config, read_json

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("raw", "theta"),
    [
        ({"rope_theta": 2e6}, 2e6),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 5e6}}, 5e6),
        ({"rope_theta": None, "rope_parameters": {**DEFAULT, "rope_theta": 5e6}}, 5e6),
        ({"rope_theta": 2e6, "rope_parameters": {**DEFAULT, "rope_theta": 5e6}}, 5e6),
        ({"rope_theta": 2e6, "rope_parameters": {**DEFAULT, "rope_theta": None}}, 2e6),
        ({"rope_theta": 2e6, "rope_parameters": DEFAULT}, 2e6),
        ({"rope_theta": 2e6, "rope_parameters": None}, 2e6),
    ],
)
def test_rope_theta_is_that_of_rope_parameters_if_it_has_one(raw: dict[str, Any], theta: float) -> None:
    assert Config.from_dict(make_config(rope_theta=None) | raw).rope_theta == theta


@pytest.mark.parametrize("raw", [{}, {"rope_theta": None}, {"rope_parameters": DEFAULT}])
def test_rope_theta_is_never_guessed(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="rope_theta is missing"):
        Config.from_dict(make_config(rope_theta=None) | raw)


@pytest.mark.parametrize("theta", [1, 0.5])
def test_yarn_needs_a_rope_theta_of_more_than_1(theta: float) -> None:
    raw = make_config(rope_theta=theta)
    assert Config.from_dict(raw).rope_theta == theta
    with pytest.raises(CheckpointError, match=rf"rope_theta is {theta}; with YaRN it must be more than 1"):
        Config.from_dict(raw | {"rope_scaling": YARN})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 5e-324}, "rope_theta is 5e-324, not a positive number in range"),
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps is 1e\+39, not a positive number in range"),
        ({"rope_scaling": YARN | {"beta_fast": 5e-324}}, "beta_fast is 5e-324, not"),
        ({"rope_scaling": YARN | {"factor": 1e9}}, r"YaRN's factor 1e\+09 makes a context of more than 2147483648"),
        ({"rope_scaling": YARN | {"factor": 1e300}}, r"factor is 1e\+300, not a positive number in range"),
        ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "YaRN's mscale is set"),
        ({"hidden_size": 2**31 + 1}, "hidden_size is 2147483649, not a whole number in range"),
        ({"vocab_size": "9" * 10**6}, r"vocab_size is '9{79}\.\.\., not a positive number"),
        ({"model_type": ["x" * 10**6]}, r"model_type \['x{78}\.\.\. is not supported"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Config.from_dict(make_config() | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [' + "{}," * 200_000 + "{}]}", "it has more than 300,000 values"),
        ('{"a": "' + "x" * 16_000_000 + '"}', "it is larger than 16 MB"),
    ],
)
def test_json_that_would_take_much_memory_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")
