"""From a checkpoint to its text with the real converter and engine, against transformers' greedy text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npqwen
from npqwen.commands import cli

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-qwen3"
GOLDEN = np.load(ROOT / "tests" / "data" / "tiny-qwen3.npz")
SUM = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "<think>\n17 + 20 = 37. 37 + 5 = 42.\n</think>\n\n17 + 25 = 42"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "tiny-qwen3"
    with pytest.raises(SystemExit) as exit:
        cli.main(["convert", str(TINY), str(out), "--bits", "16", "--quiet"])
    assert exit.value.code == 0
    return out


def test_the_command_line(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", str(converted), SUM, "--temperature", "0"])
    assert exit.value.code == 0
    out, errors = capsys.readouterr()
    assert out == f"{ANSWER}\n"
    assert errors.splitlines()[-1].endswith("; the text ended")


def test_from_python(converted: Path) -> None:
    model = npqwen.load(converted, threads=2, context=100)
    try:
        greedy = GOLDEN["greedy_1"].tolist()
        result = model.generate(SUM, temperature=0)
        assert result.text == ANSWER
        assert result.ids == greedy[: greedy.index(4098) + 1]
        assert "".join(model.stream(SUM, temperature=0, max_tokens=6)) == "<think>\n17 + "
        sampled = {model.generate("A river is", seed=seed, max_tokens=8).text for seed in (1, 1, 2, 3)}
        assert 1 < len(sampled) < 4
        with pytest.raises(npqwen.ContextLengthError, match="context is 100"):
            model.generate("1 " * 60)
    finally:
        model.close()


@pytest.mark.parametrize("bits", [3, 4])
def test_few_bits_still_add_and_call_tools(tiny: Callable[[int], Path], bits: int) -> None:
    def get_weather(city: str) -> dict[str, Any]:
        """Get the current weather in a city."""
        return {"city": city, "degrees": 17, "sky": "foggy"}

    with npqwen.load(tiny(bits), threads=1) as model:
        assert model.generate(SUM, temperature=0).text.endswith("17 + 25 = 42")
        question = "What is the weather in London?"
        reply = model.chat(question, tools=[get_weather], run_tools=True, thinking=False, temperature=0)
        assert reply.text == "It is 17 degrees and foggy in London."
