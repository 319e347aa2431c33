"""What a chat can be asked with: sampling that follows the mode, and options that no answer could have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from reciter import Reciter

import npqwen
from npqwen.errors import OptionError, SamplingWarning

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
SCHEMA = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return "sunny"


def sampling(model: Reciter, messages: Any = "Hi", **options: Any) -> tuple[float, float, int]:
    found = model.stream_chat(messages, **options)._stream.sampling
    return found.temperature, found.top_p, found.top_k


QWEN_THINKS, QWEN_ANSWERS = (0.6, 0.95, 20), (0.7, 0.8, 20)


def test_sampling_defaults_follow_the_mode() -> None:
    model = Reciter()
    assert sampling(model) == sampling(model, thinking=True) == QWEN_THINKS
    assert sampling(model, thinking=False) == QWEN_ANSWERS
    assert sampling(model, thinking=False, temperature=0.3) == (0.3, 0.8, 20)
    assert sampling(model, thinking=False, temperature=None, top_k=5) == (0.7, 0.8, 5)
    assert sampling(model, temperature=0.9) == (0.9, 0.95, 20)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Hi /no_think"], QWEN_ANSWERS),
        (["/no_think Hi"], QWEN_ANSWERS),
        (["Hi /think"], QWEN_THINKS),
        (["Hi /no_think", "And? /think"], QWEN_THINKS),
        (["Hi /think", "And? /no_think", "So?"], QWEN_ANSWERS),
        (["see a/no_think or /no_thinking"], QWEN_THINKS),
    ],
)
def test_sampling_follows_the_soft_switch_in_a_message(texts: list[str], expected: Any) -> None:
    messages = [m for text in texts for m in ({"role": "user", "content": text}, {"role": "assistant", "content": "x"})]
    assert sampling(Reciter(), messages[:-1]) == expected
    assert sampling(Reciter(), messages[:-1], thinking=False) == QWEN_ANSWERS
    assert sampling(Reciter(template="instruct-2507"), messages[:-1]) == QWEN_THINKS  # what its own file says


def test_a_file_that_somebody_tuned_is_not_overridden() -> None:
    model = Reciter()
    object.__setattr__(model.generation_config, "sampling", npqwen.Sampling(temperature=0.2, top_p=0.95, top_k=20))
    assert sampling(model, thinking=False) == (0.2, 0.95, 20)


def test_greedy_sampling_while_thinking_warns_where_it_was_asked_for() -> None:
    for options in ({"temperature": 0}, {"top_k": 1}):
        model = Reciter("<think>\nHm.\n</think>\n\nYes.")
        with pytest.warns(SamplingWarning, match="greedy sampling makes Qwen3's thinking repeat") as caught:
            reply = model.chat("Hi", **options)
        assert "temperature of 0.6" in reply.notices[0]
        assert Path(caught[0].filename).name == "reciter.py"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Reciter("Yes.").chat("Hi", thinking=False, temperature=0).notices == []
        assert Reciter("Yes.").chat("Hi /no_think", temperature=0).notices == []
        assert Reciter("Yes.", template="coder").chat("Hi", temperature=0).notices == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking": "yes"}, "thinking is 'yes'"),
        ({"tools": get_weather}, "tools is function; give a list"),
        ({"run_tools": True}, "run_tools is set, but no tool is a Python function"),
        ({"run_tools": True, "tools": [SCHEMA]}, "run_tools is set, but no tool"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"temprature": 1}, "unknown option 'temprature'; did you mean temperature"),
        ({"temperature": -1}, "temperature is -1"),
        ({"template_options": {"level": 1}}, "unknown option 'level'"),
        ({"cache": None}, "cache is not an option of a chat"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"stop": 5}, "stop is 5"),
        ({"prompt": "x"}, "unknown option 'prompt'"),
        ({"template_options": "rag"}, "template_options is 'rag'; it must be a dictionary"),
        ({"template_options": [("level", 1)]}, "must be a dictionary"),
        ({"template_options": {"thinking": False}}, "template_options has 'thinking', which is not an option"),
        ({"template_options": {"tools": []}}, "template_options has 'tools'"),
        ({"template_options": {"messages": []}}, "template_options has 'messages'"),
        ({"template_options": {"add_generation_prompt": False}}, "template_options has 'add_generation_prompt'"),
        ({"template_options": {1: 2}}, "template_options has 1"),
        ({"template_options": {"template": ["rag"]}}, r"there is no chat template \['rag'\]"),
    ],
)
def test_impossible_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    model = Reciter()
    with pytest.raises(OptionError, match=message):
        model.stream_chat("Hi", **options)
    with pytest.raises(OptionError, match=message):
        model.conversation(**options).stream("Hi")
    assert model.prompts == []


@pytest.mark.parametrize("options", [{"temprature": 1}, {"max_tokens": "5"}, {"loop_guard": 3}])
def test_a_conversation_does_not_begin_with_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Reciter().conversation(**options)


def test_options_of_every_step_are_those_that_were_given() -> None:
    read: list[int] = []
    stream = Reciter(CALL, "Sunny <end> day.", "Or <end> not.").conversation(
        tools=[get_weather], run_tools=True, thinking=False, stop=iter(["<end>"]), temperature=None,
        progress=lambda done, total: read.append(done),
    )  # fmt: skip
    assert stream.send("?").text == "Sunny "
    assert stream.send("?").text == "Or "
