"""Templates from Qwen3.5 on: they open the thinking themselves, may keep old thoughts, and grade the effort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reciter import Reciter

from npqwen.chat.chat_template import ChatTemplate, Mode
from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.errors import OptionError
from npqwen.generation.sampling import Sampling

SOURCE = (Path(__file__).parents[1] / "data" / "templates" / "qwen3.5.jinja").read_text(encoding="utf-8")
# As the releases differ: the small models of 3.5 do not think by default, 3.6 can keep all thoughts, 3.8 does so unless
# told otherwise, and has a graded effort.
OFF = "{%- if enable_thinking is defined and enable_thinking is false %}"
OLD = "{%- if loop.index0 > ns.last_query_index %}"
EFFORT = (
    "{%- set effort = reasoning_effort|default('xhigh') %}"
    "{%- if effort not in ('xhigh', 'medium', 'low') %}{{- raise_exception('Unknown effort.') }}{%- endif %}"
)
SOURCES = {
    "3.5": SOURCE,
    "3.5-small": SOURCE.replace(OFF, "{%- if not (enable_thinking is defined and enable_thinking is true) %}"),
    "3.6": SOURCE.replace(
        OLD,
        "{%- if (preserve_thinking is defined and preserve_thinking is true) or loop.index0 > ns.last_query_index %}",
    ),
    "3.8": EFFORT
    + SOURCE.replace(
        OLD,
        "{%- if preserve_thinking is undefined or preserve_thinking is true or loop.index0 > ns.last_query_index %}",
    ),
}
TEMPLATES = {name: ChatTemplate({"default": source}, {}, Path("model")) for name, source in SOURCES.items()}
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "thought"},
    {"role": "user", "content": "c"},
]
QWEN3 = Mode("switch", False, True, False)


def test_what_they_do_about_thinking() -> None:
    modes = {name: template.mode() for name, template in TEMPLATES.items()}
    assert modes == {
        "3.5": Mode("switch", True, True, False),
        "3.5-small": Mode("switch", True, False, False),
        "3.6": Mode("switch", True, True, False),
        "3.8": Mode("switch", True, True, True),
    }
    assert all(template.call_style() == "tags" for template in TEMPLATES.values())


def test_thoughts_are_kept_where_the_template_keeps_them() -> None:
    kept = {name: "thought" in template.render(TALK) for name, template in TEMPLATES.items()}
    assert kept == {"3.5": False, "3.5-small": False, "3.6": False, "3.8": True}
    assert "thought" in TEMPLATES["3.6"].render(TALK, preserve_thinking=True)
    assert "thought" not in TEMPLATES["3.8"].render(TALK, preserve_thinking=False)
    with pytest.raises(OptionError, match="unknown option 'preserve_thinking'"):
        TEMPLATES["3.5"].render(TALK, preserve_thinking=True)


def test_an_effort_that_the_template_does_not_know_is_refused() -> None:
    assert TEMPLATES["3.8"].render(TALK, reasoning_effort="low")
    with pytest.raises(OptionError, match=r"Unknown effort"):
        TEMPLATES["3.8"].render(TALK, reasoning_effort="enormous")


@pytest.mark.parametrize(
    ("name", "thinking", "expected"),
    [("3.5", None, True), ("3.5", False, False), ("3.5-small", None, False), ("3.5-small", True, True)],
)
def test_their_switch_decides(name: str, thinking: bool | None, expected: bool) -> None:
    mode = TEMPLATES[name].mode()
    assert thinks(mode, thinking, TALK) is expected
    # Words that Qwen3 obeys do nothing: these templates have opened or closed the thinking already.
    assert thinks(mode, thinking, [{"role": "user", "content": "a /no_think"}]) is expected
    assert thinks(mode, thinking, [{"role": "user", "content": "a /think"}]) is expected
    assert thinks(QWEN3, None, [{"role": "user", "content": "a /no_think"}]) is False


def sampling(temperature: float, top_p: float, presence: float) -> Sampling:
    return Sampling(temperature=temperature, top_k=20, top_p=top_p, min_p=0.0, presence_penalty=presence)


@pytest.mark.parametrize(
    ("name", "thinking", "advised"),
    [
        ("3.5", True, (1.0, 0.95, 1.5)),
        ("3.5", False, (0.7, 0.8, 1.5)),
        ("3.6", True, (1.0, 0.95, 1.5)),
        ("3.8", True, (1.0, 0.95, 0.0)),
        ("3.8", False, (0.7, 0.8, 1.5)),
    ],
)
def test_sampling_is_what_the_model_cards_advise(name: str, thinking: bool, advised: Any) -> None:
    mode = TEMPLATES[name].mode()
    for temperature in (0.6, 1.0):  # generation_config.json has one or the other
        assert default_sampling(sampling(temperature, 0.95, 0.0), mode, thinking) == sampling(*advised)
    for own in (sampling(0.9, 0.95, 0.0), sampling(1.0, 0.9, 0.0), sampling(1.0, 0.95, 0.3)):
        assert default_sampling(own, mode, thinking) == own
    assert default_sampling(sampling(0.6, 0.95, 0.0), QWEN3, thinking) == (
        sampling(0.6, 0.95, 0.0) if thinking else sampling(0.7, 0.8, 0.0)
    )
    assert default_sampling(sampling(1.0, 0.95, 0.0), QWEN3, thinking) == sampling(1.0, 0.95, 0.0)


def test_an_answer_is_split_into_thought_and_text() -> None:
    model = Reciter("Hm.\n</think>\n\nYes.", "No.", template="qwen3.5")
    reply = model.chat("?")
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")
    assert model.prompts[0].endswith("<|im_start|>assistant\n<think>\n")
    reply = model.chat("?", thinking=False)
    assert (reply.reasoning, reply.text) == ("", "No.")
    assert model.prompts[1].endswith("<think>\n\n</think>\n\n")


def test_calls_in_tags_come_back_as_the_template_writes_them() -> None:
    def weather(city: str, days: int = 1) -> str:
        """Get the weather."""
        return f"{city} {days} sunny"

    call = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    model = Reciter(f"t\n</think>\n\n{call}</function>\n</tool_call>", "d\n</think>\n\nSunny.", template="qwen3.5")
    question = {"role": "user", "content": "?"}
    reply = model.chat([question], tools=[weather])
    assert [(made.name, made.arguments) for made in reply.tool_calls] == [("weather", {"city": "Paris", "days": 2})]
    result = {"role": "tool", "content": weather(**reply.tool_calls[0].arguments)}
    assert model.chat([question, *reply.messages, result], tools=[weather]).text == "Sunny."
    assert "\n<tool_response>\nParis 2 sunny\n</tool_response>" in model.prompts[1]
    assert f"<think>\nt\n</think>\n\n{call}" in model.prompts[1]
