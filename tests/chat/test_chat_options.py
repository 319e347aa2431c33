"""Options of a chat: sampling that follows the mode, and options that are refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
from reciter import Reciter

import npqwen
from npqwen.chat.chat_options import CHAT_OPTIONS, ChatOptions, ChatSettings
from npqwen.chat.conversation import Conversation
from npqwen.errors import OptionError, SamplingWarning
from npqwen.generation.options import OPTIONS, GenerationOptions

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


def test_the_table_has_every_option_that_only_a_chat_has() -> None:
    assert set(CHAT_OPTIONS) == set(ChatOptions.__annotations__) - set(GenerationOptions.__annotations__)
    assert set(CHAT_OPTIONS) == {field.name for field in dataclasses.fields(ChatSettings)} - {"generation"}
    assert not set(CHAT_OPTIONS) & set(OPTIONS)
    for name, option in CHAT_OPTIONS.items():
        assert option.name == name
        assert f"{name}: {option.help}" in (ChatOptions.__doc__ or "")


def test_none_is_the_same_as_leaving_an_option_out() -> None:
    options: Any = dict.fromkeys([*CHAT_OPTIONS, *OPTIONS])
    assert ChatSettings.of(options) == ChatSettings.of({})
    changed = ChatSettings.of({"thinking": False, "temperature": 0.5, "tools": [get_weather], "run_tools": True})
    assert changed.override(options) == ChatSettings.of({})
    assert changed.override({"thinking": True}).generation == {"temperature": 0.5}


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
    assert sampling(Reciter(template="instruct-2507"), messages[:-1]) == QWEN_THINKS  # its generation_config.json


def test_a_generation_config_with_other_values_is_not_overridden() -> None:
    model = Reciter()
    object.__setattr__(model.generation_config, "sampling", npqwen.Sampling(temperature=0.2, top_p=0.95, top_k=20))
    assert sampling(model, thinking=False) == (0.2, 0.95, 20)


def test_greedy_sampling_while_thinking_warns_at_the_callers_line() -> None:
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
        ({"max_steps": True}, "max_steps is True"),
        ({"run_tools": 1}, "run_tools is 1; it must be True or False"),
        ({"tool": []}, "unknown option 'tool'; did you mean tools"),
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
def test_wrong_options_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    model = Reciter()
    with pytest.raises(OptionError, match=message):
        model.stream_chat("Hi", **options)
    with pytest.raises(OptionError, match=message):
        model.conversation(**options).stream("Hi")
    assert model.prompts == []


@pytest.mark.parametrize("options", [{"temprature": 1}, {"max_tokens": "5"}, {"loop_guard": 3}])
def test_a_conversation_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Reciter().conversation(**options)


def test_options_given_once_hold_for_every_answer() -> None:
    read: list[int] = []
    stream = Reciter(CALL, "Sunny <end> day.", "Or <end> not.").conversation(
        tools=[get_weather], run_tools=True, thinking=False, stop=iter(["<end>"]), temperature=None,
        progress=lambda done, total: read.append(done),
    )  # fmt: skip
    assert stream.send("?").text == "Sunny "
    assert stream.send("?").text == "Or "


@pytest.mark.parametrize("wrong", [3, "Hi", {"role": "user"}, [3], None, b"x", object()])
def test_arguments_of_a_wrong_type_are_option_errors(wrong: Any, tmp_path: Path) -> None:
    model = Reciter("Yes.", "Yes.")
    talk = model.conversation(thinking=False)
    true: Any = wrong or 3
    calls: list[Any] = [
        lambda: model.stream_chat("Hi", session=true),
        lambda: model.conversation(messages=wrong),
        lambda: model.chat_template.render("Hi", tools=true),
        lambda: model.chat_template.render("Hi", template=true),
        lambda: talk.add(wrong),
    ]
    if not isinstance(wrong, str):
        calls += [
            lambda: model.stream_chat(wrong),
            lambda: model.conversation(true),
            lambda: talk.send(true),
            lambda: talk.save(wrong),
            lambda: Conversation.load(model, wrong),
        ]
    for call in calls:
        with pytest.raises(OptionError) as error:
            call()
        assert "\n" not in str(error.value)
    assert talk.messages == []
