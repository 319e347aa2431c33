"""YaRN as an option: the same model as with Qwen's lines in config.json, and factors that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, write_checkpoint
from converted import small_model
from npqwen_quant import convert
from reference import ReferenceModel, rope_tables

from npqwen.commands import cli
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.rope import Rope
from npqwen.errors import FormatError, OptionError
from npqwen.format.config import Config, Yarn
from npqwen.generation.session import Session
from npqwen.model import load
from npqwen.reports.info import describe, inspect

IDS = np.random.default_rng(0).integers(0, 203, 150)


def qwen3(positions: int = 40960, **changes: Any) -> Config:
    return Config.from_dict(make_config(head_dim=128, rope_theta=1e6, max_position_embeddings=positions, **changes))


def written(factor: float, original: int) -> dict[str, Any]:
    """What Qwen's model cards have one add to config.json."""
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return {"rope_scaling": scaling}


@pytest.mark.parametrize("factor", [1.5, 2, 4.0, np.float32(2.5)])
def test_it_is_the_model_with_yarn_in_its_config(factor: Any, tmp_path: Path) -> None:
    config = make_config(max_position_embeddings=80)
    tensors = write_checkpoint(tmp_path / "checkpoint", config, tokenizer=True)
    convert(tmp_path / "checkpoint", tmp_path / "plain", bits=16)
    convert(tmp_path / "checkpoint", tmp_path / "yarn", bits=16)
    (tmp_path / "yarn" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "plain" / "config.json").read_text()) | written(float(factor), 64))
    )
    oracle = ReferenceModel(Config.from_dict(config | written(float(factor), 64)), tensors, context=96)
    expected = oracle.logits(IDS[:96])
    with load(tmp_path / "plain", threads=2, yarn=factor) as model, load(tmp_path / "yarn", threads=2) as edited:
        found = model.logits(IDS[:96])
        assert model.context == edited.context == 64 * factor
        assert np.array_equal(found, edited.logits(IDS[:96]))
        assert model.fingerprint == edited.fingerprint
        assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    with load(tmp_path / "plain", threads=2) as plain, load(tmp_path / "yarn", threads=2, yarn=1) as off:
        assert np.abs(plain.logits(IDS[:80]) - expected[:80]).max() > 2e-2 * np.abs(expected).max()
        assert off.config == replace(plain.config, max_position_embeddings=64)
        assert np.array_equal(off.logits(IDS[:64]), plain.logits(IDS[:64]))


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_angles_up_to_the_longest_context(factor: float) -> None:
    """Against the oracle, whose only knowledge is the factor and the 32,768 tokens of the model cards."""
    rope = Rope(with_yarn(qwen3(), factor))
    oracle = replace(qwen3(), yarn=Yarn(factor, 32768))
    last = int(factor * 32768) - 1
    for start in (0, 32767, last - 3):
        positions = np.arange(start, start + 4, dtype=np.float32)
        for found, expected in zip(rope.tables(start, 4), rope_tables(oracle, positions), strict=True):
            # One rounding step of a frequency of 1 is 0.008 radians at position 131,071.
            assert np.abs(found - expected).max() < 0.02


@pytest.mark.parametrize(
    ("positions", "factor", "longest", "trained"),
    [
        (40960, 2, 65536, 32768),
        (40960, 4, 131072, 32768),
        (40960, 1.6, 52428, 32768),
        (32768, 1.5, 49152, 32768),
        (2048, 4, 8192, 2048),
        (1, 2, 2, 1),
    ],
)
def test_the_factor_refers_to_the_tokens_trained_on(positions: int, factor: float, longest: int, trained: int) -> None:
    config = with_yarn(qwen3(positions), factor)
    assert config.yarn == Yarn(factor, trained)
    assert config.longest_context == context_length(config, None) == context_length(config, longest) == longest


def test_it_replaces_the_factor_of_the_config() -> None:
    config = Config.from_dict(make_config(max_position_embeddings=131072, **written(4, 32768)))
    assert with_yarn(config, None) is config
    assert with_yarn(config, 2).yarn == Yarn(2, 32768)
    assert with_yarn(config, 2).longest_context == 65536
    assert with_yarn(config, 1).yarn is None
    assert with_yarn(config, 1).longest_context == 32768
    assert with_yarn(qwen3(), 1) == qwen3()


@pytest.mark.parametrize(
    ("config", "factor", "message"),
    [
        (qwen3(), 0.5, "yarn is 0.5; it must be a number from 1 to 4"),
        (qwen3(), 4.01, "yarn is 4.01; it must be a number from 1 to 4"),
        (qwen3(), float("nan"), "yarn is nan; it must be a number from 1 to 4"),
        (qwen3(), "2", "yarn is '2'; it must be a number from 1 to 4"),
        (qwen3(), True, "yarn is True; it must be a number from 1 to 4"),
        (
            qwen3(),
            1.25,
            "a YaRN factor of 1.25 allows 40,960 tokens, but this model supports 40,960 without YaRN; leave the factor "
            "out, or choose a larger one",
        ),
        (qwen3(262144), 2, "this model supports 262,144 tokens without YaRN; leave the YaRN factor out"),
        (qwen3(131072), 4, "this model supports 131,072 tokens without YaRN; leave the YaRN factor out"),
        (replace(qwen3(), rope_theta=1.0), 2, "this model's rope_theta is 1; YaRN needs more than 1"),
    ],
)
def test_factors_that_are_refused(config: Config, factor: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        with_yarn(config, factor)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (qwen3(), 50_000, "at most 40,960; --yarn 1.6 (in Python, yarn=1.6) extends that to 52,428"),
        (qwen3(), 65_536, "at most 40,960; --yarn 2 (in Python, yarn=2) extends that to 65,536"),
        (qwen3(), 131_072, "at most 40,960; --yarn 4 (in Python, yarn=4) extends that to 131,072"),
        (qwen3(), 131_073, "at most 40,960, and 131,072 with --yarn 4 (in Python, yarn=4)"),
        (qwen3(262144), 300_000, "at most 262,144"),
        (
            with_yarn(qwen3(), 2),
            100_000,
            "at most 65,536 with a YaRN factor of 2; --yarn 3.1 (in Python, yarn=3.1) extends that to 101,580",
        ),
        (with_yarn(qwen3(), 4), 131_073, "at most 131,072 with a YaRN factor of 4"),
    ],
)
def test_a_context_that_is_too_large_names_the_factor_that_would_do(config: Config, tokens: int, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        context_length(config, tokens)
    assert str(caught.value) == f"a context of {tokens:,} tokens is too large: this model supports {message}"
    if "extends" in message:
        factor = float(message.split("--yarn ")[1].split()[0])
        assert context_length(with_yarn(config, factor), tokens) == tokens


def test_a_saved_session_belongs_to_its_factor(tmp_path: Path) -> None:
    path = small_model(tmp_path / "model", 4)
    with load(path, threads=1, yarn=2) as model:
        session = Session(model)
        session.prefill(IDS[:20])
        session.save(tmp_path / "saved")
        assert Session.load(model, tmp_path / "saved").ids == IDS[:20].tolist()
    for factor in (None, 3):
        with load(path, threads=1, yarn=factor) as model, pytest.raises(FormatError, match="another YaRN factor"):
            Session.load(model, tmp_path / "saved")


def test_info_shows_it(tiny: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    plain, extended = inspect(tiny(4)), inspect(tiny(4), yarn=4)
    assert "positions       up to 2,048, rope" in describe(plain)
    assert "positions       up to 8,192 by YaRN, 4 x 2,048, rope" in describe(extended)
    assert (extended.context, extended.cache) == (8192, 4 * plain.cache)
    with pytest.raises(SystemExit) as exit:
        cli.main(["info", str(tiny(4)), "--yarn", "2", "--context", "4096"])
    assert exit.value.code == 0
    assert "up to 4,096 by YaRN" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        cli.main(["info", str(tiny(4)), "--context", "4096"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "npqwen: error: a context of 4,096 tokens is too large: this model supports at most 2,048; "
        "--yarn 2 (in Python, yarn=2) extends that to 4,096\n"
    )


def test_commands_run_with_it(tiny: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "river (noun): a large natural stream of water. " * 150  # 2,401 tokens
    for options, status in (([], 2), (["--yarn", "2"], 0)):
        with pytest.raises(SystemExit) as exit:
            cli.main(["generate", str(tiny(4)), prompt, "--max-tokens", "3", *options])
        assert exit.value.code == status
        assert ("the context is 2,048; shorten it, or load the" in capsys.readouterr().err) == bool(status)
