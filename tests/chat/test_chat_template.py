"""Rendering of conversations, against Hugging Face transformers (tests/data/make_chats.py)."""

from __future__ import annotations

import datetime
import enum
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from npqwen.chat import template_sandbox
from npqwen.chat.chat_template import ChatTemplate, opens_thinking
from npqwen.errors import CheckpointError, OptionError

DATA = Path(__file__).parents[1] / "data"
TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
CHATS = json.loads((DATA / "chats.json").read_text(encoding="utf-8"))
TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
NAMES = ("hybrid", "thinking-2507", "instruct-2507", "coder", "qwen3.5", "features")
SOURCES = {name: (DATA / "templates" / f"{name}.jinja").read_text(encoding="utf-8") for name in NAMES}
HI = [{"role": "user", "content": "Hi"}]


def template(name: str) -> ChatTemplate:
    return ChatTemplate({"default": SOURCES[name]}, TOKENS, Path("model"))


TEMPLATES = {name: template(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_renders_equal_those_of_transformers_to_the_byte(name: str) -> None:
    cases = [case for case in CHATS if case["template"] == name]
    assert len(cases) >= 4
    for case in cases:
        options = dict(case["options"])
        thinking = options.pop("enable_thinking", None)
        options.setdefault("add_generation_prompt", False)
        before = json.dumps(case["messages"])
        if case["rendered"] is None:
            with pytest.raises(OptionError, match="the chat template refuses these messages"):
                TEMPLATES[name].render(case["messages"], case["tools"], thinking, **options)
            continue
        rendered = TEMPLATES[name].render(case["messages"], case["tools"], thinking, **options)
        assert rendered == case["rendered"], case
        assert json.dumps(case["messages"]) == before


def test_the_tiny_models_own_template_is_qwens() -> None:
    tiny = ChatTemplate.from_directory(TINY)
    assert tiny.names == ["default"]
    assert tiny.render("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.render(HI, thinking=False) == tiny.render(HI) + "<think>\n\n</think>\n\n"


# --- thinking ---


def test_whether_a_template_has_a_switch_for_thinking_is_found_by_rendering() -> None:
    kinds = {name: TEMPLATES[name].thinking() for name in NAMES}
    assert kinds == {
        "hybrid": "switch",
        "thinking-2507": "always",
        "instruct-2507": "never",
        "coder": "never",
        "qwen3.5": "switch",
        "features": "never",
    }
    # A switch of the same name that does nothing is none.
    idle = ChatTemplate({"default": "{{ 'x' if enable_thinking else 'x' }}"}, {}, Path())
    assert idle.thinking() == "never"


def test_thinking_is_refused_not_ignored_by_a_template_without_a_switch() -> None:
    with pytest.raises(OptionError, match="always thinks: its chat template has no switch"):
        TEMPLATES["thinking-2507"].render(HI, thinking=False)
    for name in ("instruct-2507", "coder"):
        with pytest.raises(OptionError, match="does not think: its chat template has no switch"):
            TEMPLATES[name].render(HI, thinking=True)
    with pytest.raises(OptionError, match="thinking is 'off'"):
        TEMPLATES["hybrid"].render(HI, thinking="off")  # type: ignore[arg-type]


def test_thinking_may_be_set_to_what_a_model_always_does() -> None:
    always, never = TEMPLATES["thinking-2507"], TEMPLATES["instruct-2507"]
    assert always.render(HI, thinking=True) == always.render(HI)
    assert never.render(HI, thinking=False) == never.render(HI)


def test_enable_thinking_is_refused_with_the_name_to_use() -> None:
    with pytest.raises(OptionError, match="give thinking=True or thinking=False"):
        TEMPLATES["hybrid"].render(HI, enable_thinking=False)


def test_variables_are_those_that_a_caller_can_set() -> None:
    settable = {name: sorted(TEMPLATES[name].variables()) for name in NAMES}
    assert settable.pop("qwen3.5") == ["add_vision_id"]
    assert settable.pop("features") == ["level"]
    assert set(map(tuple, settable.values())) == {()}  # their own `content` and `reasoning_content` are none
    source = (
        "{% if not depth is defined %}{% set depth = 1 %}{% endif %}{% set grade = grade or 'low' %}"
        "{% for one in messages %}{% if one.content %}{% set own = one.content %}{% endif %}{{ own }}{% endfor %}"
        "{% macro shown(text) %}{{ text }}{{ style }}{% endmacro %}{{ shown(own) }}{{ depth }}"
    )
    assert ChatTemplate({"default": source}, {}, Path()).variables() == {"depth", "grade", "style"}


def test_an_unknown_variable_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r"'colour': the chat template has no such variable; it has add_vision_id$"):
        TEMPLATES["qwen3.5"].render(HI, colour=1)
    with pytest.raises(OptionError, match=r"'content': .* it has none that can be set"):
        TEMPLATES["hybrid"].render(HI, content="x")


@pytest.mark.parametrize(
    ("prompt", "open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\nso far", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>a</think>b<|im_end|>\n<|im_start|>assistant\n<think>", True),
        ("", False),
        ("<think>", True),
    ],
)
def test_whether_a_prompt_opens_thinking_follows_from_its_end(prompt: str, open: bool) -> None:
    assert opens_thinking(prompt) is open


# --- forms of messages that a template does not read by itself ---


def test_text_parts_are_joined_if_a_template_cannot_read_lists() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    for name in ("hybrid", "thinking-2507", "instruct-2507", "coder"):
        assert TEMPLATES[name].render(parts) == TEMPLATES[name].render("a\nb")
    assert "user: a|b\n" in TEMPLATES["features"].render(parts)


def test_arguments_as_a_json_string_reach_a_template_that_wants_objects() -> None:
    def talk(arguments: Any) -> list[dict[str, Any]]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        bare = {"name": "g", "arguments": arguments}
        return [*HI, {"role": "assistant", "content": None, "tool_calls": [call, bare]}]

    coder = TEMPLATES["coder"]
    assert coder.render(talk('{"a": [1]}')) == coder.render(talk({"a": [1]}))
    assert '"arguments": {"a":[1]}' in TEMPLATES["hybrid"].render(talk('{"a":[1]}'))
    with pytest.raises(OptionError, match=r"messages\[1\] has a call of 'f' with arguments that are not a JSON object"):
        coder.render(talk("{"))


def test_a_call_without_content_as_openai_writes_it_renders() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    null: list[dict[str, Any]] = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    absent: list[dict[str, Any]] = [*HI, {"role": "assistant", "tool_calls": [call]}]
    empty: list[dict[str, Any]] = [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for name in ("hybrid", "thinking-2507", "instruct-2507", "coder"):
        render = TEMPLATES[name].render
        assert render(null) == render(absent) == render(empty)


@pytest.mark.parametrize("name", ["hybrid", "thinking-2507", "instruct-2507", "coder"])
def test_a_call_without_arguments_has_empty_ones(name: str) -> None:
    def talk(**arguments: Any) -> list[dict[str, Any]]:
        return [*HI, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", **arguments}}]}]

    render = TEMPLATES[name].render
    assert render(talk()) == render(talk(arguments=None)) == render(talk(arguments={}))


def test_strings_of_a_subclass_are_rendered_as_their_characters() -> None:
    class Word(str, enum.Enum):
        ROLE = "role"
        USER = "user"
        HI = "Hi"

    assert TEMPLATES["hybrid"].render([{Word.ROLE: Word.USER, "content": Word.HI}]) == TEMPLATES["hybrid"].render(HI)
    assert TEMPLATES["hybrid"].render(Word.HI) == TEMPLATES["hybrid"].render(HI)


# --- what is refused ---

CYCLE: list[Any] = []
CYCLE += [CYCLE, CYCLE]


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "list of messages is empty"),
        ({"role": "user"}, "messages is of type dict; give a list"),
        (b"Hi", "messages is of type bytes"),
        (["Hi"], r"messages\[0\] is of type str; give an object"),
        ([{"content": "Hi"}], r"messages\[0\] has the role None; it must be one of system, user, assistant, tool"),
        ([*HI, {"role": "critic", "content": "Hi"}], r"messages\[1\] has the role 'critic'"),
        ([{"role": "user"}], r"messages\[0\], with the role user, has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "assistant", "tool_calls": []}], "with the role assistant, has no content"),
        ([{"role": "tool", "content": {"a": 1}}], r"content of type dict; give a string \(json.dumps for data\)"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": "user", "content": ["Hi"]}], "a content part that is not an object like"),
        ([{"role": "user", "content": ["text"]}], "a content part that is not an object like"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url'; Qwen3 reads text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content part without text"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "tool_calls, which is allowed in an assistant's"),
        ([{"role": "user", "content": "a", "reasoning_content": "r"}], "allowed in an assistant's message only"),
        ([{"role": "assistant", "content": "a", "reasoning": 1}], "reasoning of type int"),
        ([{"role": "assistant", "tool_calls": {"name": "f"}}], "tool_calls of type dict; it must be a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a tool call without a function name"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "a tool call without a function name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "neither an object nor a string"),
        ([{"role": "user", "content": "a", "extra": object()}], "of type object, which is not a JSON value"),
        ([{"role": "user", "content": "a", "extra": {1: 2}}], "a key that is not a string"),
        ([{"role": "user", "content": "a", 1: 2}], r"messages\[0\] has a key that is not a string"),
        ([{"role": "user", "content": "a", "extra": nested(200)}], r"messages\[0\]\['extra'\].* more than 128 levels"),
        ([{"role": "user", "content": "a", "extra": CYCLE}], "more than 128 levels"),
        ("half \ud800", "not valid Unicode: it contains half a surrogate pair"),
        ([{"role": "tool", "content": "half \udc00"}], r"messages\[0\]\['content'\] is not valid Unicode"),
        (
            [*HI, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"\ud800": 1}}]}],
            r"a key of messages\[1\]\['tool_calls'\]\[0\]\['arguments'\] is not valid Unicode",
        ),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        TEMPLATES["hybrid"].render(messages)
    assert "\n" not in str(error.value)


def test_options_that_the_template_does_not_know_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown option 'level': the chat template has no such"):
        TEMPLATES["hybrid"].render(HI, level="high")
    with pytest.raises(OptionError, match=r"unknown option 'levle'.*it has level$"):
        TEMPLATES["features"].render(HI, levle="high")
    with pytest.raises(OptionError, match="unknown option 'eos_token'"):
        TEMPLATES["features"].render(HI, eos_token="x")
    with pytest.raises(OptionError, match="level is of type object, which is not a JSON value"):
        TEMPLATES["features"].render(HI, level=object())


def test_a_templates_own_refusal_comes_through_in_one_line() -> None:
    late = [*HI, {"role": "system", "content": "x"}]
    with pytest.raises(OptionError, match=r"refuses these messages: System message must be at the beginning\.$"):
        TEMPLATES["features"].render(late)


# --- files ---


def write(directory: Path, config: Any = None, **files: str) -> Path:
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in files.items():
        path = directory / (name.replace("__", "/") + ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


def test_a_base_model_without_template_names_generate(tmp_path: Path) -> None:
    for config in (None, {}, {"chat_template": None}):
        with pytest.raises(OptionError, match=r"has no chat template, like all base models; .*generate"):
            ChatTemplate.from_directory(write(tmp_path, config)).render(HI)


def test_a_template_file_takes_precedence_over_the_config(tmp_path: Path) -> None:
    found = ChatTemplate.from_directory(write(tmp_path, {"chat_template": "old"}, chat_template="né東"))
    assert found.render(HI) == "né東"


def test_named_templates_in_a_list(tmp_path: Path) -> None:
    listed = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t"},
        {"name": "rag", "template": "r"},
    ]
    found = ChatTemplate.from_directory(write(tmp_path, {"chat_template": listed}))
    assert found.names == ["default", "rag", "tool_use"]
    assert found.render(HI) == "d"
    assert found.render(HI, tools=[]) == "t"
    assert found.render(HI, template="rag") == "r"
    with pytest.raises(OptionError, match=r"no chat template 'x'; choose one of default, rag, tool_use"):
        found.render(HI, template="x")


def test_named_templates_in_files(tmp_path: Path) -> None:
    files = {"chat_template": "d", "additional_chat_templates__rag": "r", "additional_chat_templates__tool_use": "t"}
    found = ChatTemplate.from_directory(write(tmp_path, None, **files))
    assert [found.render(HI), found.render(HI, template="rag"), found.render(HI, tools=[])] == ["d", "r", "t"]


def test_one_of_several_templates_without_a_default_must_be_chosen(tmp_path: Path) -> None:
    files = {"additional_chat_templates__a": "A", "additional_chat_templates__b": "B"}
    found = ChatTemplate.from_directory(write(tmp_path, None, **files))
    with pytest.raises(OptionError, match="no chat template 'default'; choose one of a, b"):
        found.render(HI)
    assert found.render(HI, template="b") == "B"


def test_special_tokens_are_variables_in_every_notation(tmp_path: Path) -> None:
    config = {"bos_token": None, "eos_token": {"__type": "AddedToken", "content": "<e>"}, "pad_token": "<p>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<b>"}, "pad_token": "<q>"}))
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"
    found = ChatTemplate.from_directory(write(tmp_path, config, chat_template=source))
    assert found.render(HI) == "<b><e><p>False"


def test_strftime_now_is_the_current_date(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2031, 4, 5)

    monkeypatch.setattr(template_sandbox, "datetime", Clock)
    assert ChatTemplate({"default": "{{ strftime_now('%d %b %Y') }}"}, {}, Path()).render(HI) == "05 Apr 2031"


@pytest.mark.parametrize("value", [3, [{"name": "a"}], ["a"], {"default": "a"}])
def test_a_damaged_entry_in_the_config_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="chat_template is neither a string nor a list of named templates"):
        ChatTemplate.from_directory(write(tmp_path, {"chat_template": value}))


def test_a_template_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate.from_directory(tmp_path)


def test_converting_a_checkpoint_keeps_every_template(tmp_path: Path) -> None:
    from npqwen_quant import convert

    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    write(source, None, chat_template="d", additional_chat_templates__rag="r")
    convert(source, tmp_path / "out", bits=4)
    found = ChatTemplate.from_directory(tmp_path / "out")
    assert [found.render(HI), found.render(HI, template="rag")] == ["d", "r"]
