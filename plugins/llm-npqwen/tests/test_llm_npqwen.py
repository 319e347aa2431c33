"""The plugin in the real LLM, by its Python API and its command line, with the small model of npqwen's examples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm_npqwen import named

import npqwen
from npqwen.hub.inventory import Conversion

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
NAME = "npqwen/tiny-qwen3"
GREEDY = {"temperature": 0}

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")


@pytest.fixture(scope="session", autouse=True)
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """npqwen's cache with the small model at 16 bits, and a place for LLM's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPQWEN_CACHE", str(tmp_path_factory.mktemp("npqwen")))
        patch.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        done = CliRunner().invoke(cli, ["npqwen", "pull", str(TINY), "--bits", "16"])
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{NAME}\n"
        (line,) = CliRunner().invoke(cli, ["npqwen", "list"]).stdout.splitlines()
        yield Path(line.split("\t")[1])


@pytest.fixture
def model() -> llm.Model:
    return llm.get_model(NAME)


def get_weather(city: str) -> dict[str, Any]:
    """Get the current weather in a city."""
    return {"city": city, "degrees": 17, "sky": "foggy"}


def test_an_answer_is_npqwens(model: llm.Model, converted: Path) -> None:
    with npqwen.load(converted) as own:
        reply = own.chat("Define anger.", thinking=False, seed=1)
    response = model.prompt("Define anger.", thinking=False, seed=1)
    assert response.text() == reply.text
    assert response.usage().input == reply.usage.prompt_tokens
    assert response.usage().output == reply.usage.generated_tokens


def test_reasoning_is_apart_from_the_text(model: llm.Model) -> None:
    response = model.prompt("What is 17 + 25?", thinking=True, **GREEDY)
    pieces = list(response.stream_events())
    reasoning = "".join(piece.chunk for piece in pieces if piece.type == "reasoning")
    assert reasoning.strip().endswith("= 42.")
    assert response.text() == "17 + 25 = 42"
    assert response.usage().details["reasoning_tokens"] > 5


def test_a_conversation_goes_on_and_its_beginning_is_not_computed_again(model: llm.Model) -> None:
    conversation = model.conversation()
    first = conversation.prompt("What is 17 + 25?", system="You add. " * 60, options=GREEDY | {"thinking": False})
    assert first.text() == "17 + 25 = 42"
    second = conversation.prompt("What is 30 + 12?", options=GREEDY | {"thinking": False})
    assert second.text() == "30 + 12 = 42"
    assert second.usage().details["cached_tokens"] > 100
    assert second.usage().input > first.usage().input + 10


def test_tools_are_called_and_their_results_are_read(model: llm.Model) -> None:
    chain = model.chain("What is the weather in London?", tools=[get_weather], options=GREEDY | {"thinking": False})
    assert chain.text().endswith("It is 17 degrees and foggy in London.")
    (call,) = [call for response in chain._responses for call in response.tool_calls()]
    assert (call.name, call.arguments) == ("get_weather", {"city": "London"})
    assert call.tool_call_id


def test_a_schema_is_followed(model: llm.Model) -> None:
    schema = llm.schema_dsl("name, age int")
    response = model.prompt("A dog", schema=schema, thinking=False, seed=2)
    answer = json.loads(response.text())
    assert isinstance(answer["name"], str)
    assert isinstance(answer["age"], int)


def test_the_asynchronous_model_says_the_same(model: llm.Model) -> None:
    async def ask() -> str:
        response = llm.get_async_model(NAME).prompt("Define anger.", thinking=False, seed=1)
        return str(await response.text())

    assert asyncio.run(ask()) == model.prompt("Define anger.", thinking=False, seed=1).text()


def test_the_command_line_prints_logs_and_continues() -> None:
    run = CliRunner().invoke
    plain = ["-o", "thinking", "0", "-o", "temperature", "0"]
    options = ["-m", NAME, *plain]
    done = run(cli, ["What is 17 + 25?", *options])
    assert (done.exit_code, done.stdout) == (0, "17 + 25 = 42\n")
    assert run(cli, ["What is 30 + 12?", "-c", *plain]).stdout == "30 + 12 = 42\n"
    logged = run(cli, ["logs", "--json", "-n", "2"])
    assert [entry["response"] for entry in json.loads(logged.stdout)] == ["17 + 25 = 42", "30 + 12 = 42"]
    tool = run(
        cli,
        ["Weather in Tokyo?", *options, "--functions", "def get_weather(city: str) -> str:\n    return 'rain'", "--td"],
    )
    assert tool.exit_code == 0
    assert "get_weather" in tool.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["-o", "top_k", "-1"], "top_k is -1"), (["-o", "heat", "2"], "heat"), (["-a", __file__], "attachments")],
)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["Hello", "-m", NAME, *arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_model_that_is_nowhere_is_one_line() -> None:
    done = CliRunner().invoke(cli, ["npqwen", "pull", "no such model"])
    assert done.exit_code == 1
    assert done.output == "Error: 'no such model' is neither a directory nor a hub id like Qwen/Qwen3-0.6B\n"


def conversion(model: str, bits: int | None, used: float = 0.0, stale: str | None = None) -> Conversion:
    path = Path("/cache") / f"{model.replace('/', '-')}-{bits}-{used}"
    return Conversion(path, model, {}, bits, False, used, stale)


def test_names_are_short_and_tell_conversions_apart() -> None:
    found = [
        conversion("Qwen/Qwen3-0.6B", 8),
        conversion("Qwen/Qwen3-0.6B", 4),
        conversion("someone/Qwen3-tuned", 3),
        conversion(str(Path("/models/mine").absolute()), 16),
        conversion("Qwen/Qwen3-4B", 4, stale="a newer conversion has replaced it"),
        conversion("Qwen/Qwen3-8B", None),
    ]
    assert {name: one.bits for name, one in named(found).items()} == {
        "npqwen/Qwen3-0.6B": 4,
        "npqwen/Qwen3-0.6B:8bit": 8,
        "npqwen/someone/Qwen3-tuned": 3,
        "npqwen/mine": 16,
    }
