"""Taking a model's text apart: what each text means, and that it means the same however it is cut."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from reply_events import cuts, parsed

from npqwen.chat.chat_template import ChatTemplate, opens_thinking
from npqwen.chat.events import CallArguments, CallStart, Reasoning, Text, UnfinishedCall
from npqwen.chat.reply_parser import ReplyParser
from npqwen.tools.calls import ToolCall

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
PARIS = ToolCall("get_weather", {"city": "Paris"})
LIMA = ToolCall("get_weather", {"city": "Lima"})
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CALL_2 = CALL.replace("Paris", "Lima")
CODER = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
SCHEMAS: dict[str, Any] = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "write": {"type": "object", "properties": {"text": {"type": "string"}}},
}
LANGUAGES = (
    "naïve Ελληνικά русский עברית العربية हिन्दी ไทย 中文 日本語 한국어 \U0001f469\u200d\U0001f469\u200d\U0001f467 "
    "\U0001f1eb\U0001f1f7 e\u0301 \u202eabc\u202c\u2028\u3000\x00\ufffd \U00020000 1️⃣"
)


class Result(NamedTuple):
    reasoning: str
    text: str
    calls: list[ToolCall]
    order: str
    """r, t, c and u for the kinds as they came, repeated text and reasoning once."""
    unfinished: list[UnfinishedCall] = []  # noqa: RUF012


def parse(*pieces: str, whole: bool = True, **options: Any) -> Result:
    found = parsed(*pieces, whole=whole, **options)
    letters = {Reasoning: "r", Text: "t", CallStart: "", CallArguments: "", ToolCall: "c", UnfinishedCall: "u"}
    order = "".join(letters[type(piece)] for piece in found)
    return Result(
        "".join(p.text for p in found if isinstance(p, Reasoning)),
        "".join(p.text for p in found if isinstance(p, Text)),
        [p for p in found if isinstance(p, ToolCall)],
        order,
        [p for p in found if isinstance(p, UnfinishedCall)],
    )


def said(text: str, reasoning: str = "", calls: list[ToolCall] | None = None, order: str | None = None) -> Result:
    calls = calls or []
    usual = ("r" if reasoning else "") + ("t" if text else "") + "c" * len(calls)
    return Result(reasoning, text, calls, usual if order is None else order)


# Each a raw text and what it means.
CORPUS = {
    "plain": ("Hello, world.\n\nBye.\n", said("Hello, world.\n\nBye.\n")),
    "nothing": ("", said("")),
    "code that begins indented": ("    x = 1\n", said("    x = 1\n")),
    "a thought": ("<think>\nHm.\n\nSo.\n</think>\n\nYes.", said("Yes.", "Hm.\n\nSo.")),
    "a thought without newlines": ("<think>Hm.</think>Yes.", said("Yes.", "Hm.")),
    "newlines before a thought": ("\n\n<think>\nHm.\n</think>\n\nYes.", said("Yes.", "Hm.")),
    "empty think tags": ("<think>\n\n</think>\n\nYes.", said("Yes.")),
    "empty think tags in one line": ("<think></think>Yes.", said("Yes.")),
    "an unfinished thought": ("<think>\nHm. And", said("", "Hm. And")),
    "a thought broken off in its closing tag": ("<think>\nHm.</thi", said("", "Hm.</thi")),
    "a second thought": ("<think>a</think>b\n<think>c</think>\n\nd", said("b\nd", "a\nc", order="rtrt")),
    "a closing tag alone": ("Yes.\n</think>\n\nNo.", said("Yes.\nNo.")),
    "thinking of a call": (f"<think>\nI write {CALL} now", said("", f"I write {CALL} now")),
    "thinking of a call, then calling": (
        f"<think>\nI write {CALL_2} now\n</think>\n\n{CALL}",
        said("", f"I write {CALL_2} now", [PARIS]),
    ),
    "a thought about tags": ("<think>\nThe `</think>` tag\n</think>\n\nok", said("ok", "The `</think>` tag")),
    "an answer about tags": ("Use `<think>` or '<tool_call>'.", said("Use `<think>` or '<tool_call>'.")),
    "a quotation mark before the end of a thought": ('<think>\nIt is "42"</think>42', said("42", 'It is "42"')),
    "a backtick before a thought": ("`<think>a</think>", said("`", "a", order="tr")),
    "less-than signs": ("a < b <t <think x> </ think> <<", said("a < b <t <think x> </ think> <<")),
    "a call": (CALL, said("", "", [PARIS])),
    "a thought and a call": (f"<think>\nHm.\n</think>\n\n{CALL}", said("", "Hm.", [PARIS])),
    "text before a call": (f"I look.\n\n{CALL}", said("I look.", "", [PARIS])),
    "text after a call": (f"I look.\n{CALL}\nDone.", said("I look.\nDone.", "", [PARIS], "tct")),
    "several calls": (f"{CALL}\n{CALL_2}", said("", "", [PARIS, LIMA])),
    "calls without anything between them": (CALL + CALL_2, said("", "", [PARIS, LIMA])),
    "a call without a closing tag": (CALL.removesuffix("</tool_call>"), said("", "", [PARIS])),
    "calls of which the first has no closing tag": (
        CALL.removesuffix("</tool_call>") + CALL_2,
        said("", "", [PARIS, LIMA]),
    ),
    "a call with a brace missing": (CALL.replace("}}", "}"), said("", "", [PARIS])),
    "a call with a brace too many": (CALL.replace("}}", "}}}"), said("", "", [PARIS])),
    "two calls between one pair of tags": (
        CALL.removesuffix("</tool_call>") + CALL_2.removeprefix("<tool_call>"),
        said("", "", [PARIS, LIMA]),
    ),
    "a list of calls": (
        '<tool_call>[{"name": "a"}, {"name": "b", "arguments": null}]</tool_call>',
        said("", "", [ToolCall("a", {}), ToolCall("b", {})]),
    ),
    "a call in a fence": (
        CALL.replace("<tool_call>\n", "<tool_call>\n```json\n").replace("\n</", "\n```\n</"),
        said("", "", [PARIS]),
    ),
    "arguments in a string": (
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        said("", "", [PARIS]),
    ),
    "parameters for arguments": (CALL.replace("arguments", "parameters"), said("", "", [PARIS])),
    "a call in the form of a message": (
        CALL.replace('{"name', '{"type": "function", "function": {"name').replace("}}", "}}}"),
        said("", "", [PARIS]),
    ),
    "a newline in a string": (
        '<tool_call>{"name": "write", "arguments": {"text": "a\nb"}}</tool_call>',
        said("", "", [ToolCall("write", {"text": "a\nb"})]),
    ),
    "tags in an argument": (
        '<tool_call>{"name": "write", "arguments": {"text": "</tool_call> x <tool_call> <think> \\" {"}}</tool_call>.',
        said(".", "", [ToolCall("write", {"text": '</tool_call> x <tool_call> <think> " {'})], "ct"),
    ),
    "malformed JSON": ("<tool_call>\n{name: get_weather}\n</tool_call>", said("{name: get_weather}")),
    "JSON that is no call": ('<tool_call>{"city": "Paris"}</tool_call>', said('{"city": "Paris"}')),
    "arguments that are no object": (
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        said('{"name": "a", "arguments": [1]}'),
    ),
    "a call without a name": (
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        said('{"name": "", "arguments": {}}'),
    ),
    "no JSON at all": ("<tool_call>get_weather(Paris)</tool_call>", said("get_weather(Paris)")),
    "a malformed call before a good one": (
        f'<tool_call>{{"name": "a, "arguments": {{}}}}</tool_call>\n{CALL}',
        said('{"name": "a, "arguments": {}}', "", [PARIS]),
    ),
    "a call whose string never ends": (
        f'<tool_call>{{"name": "a</tool_call>\nx\n{CALL}',
        said('{"name": "a\nx', "", [PARIS]),
    ),
    "an empty call": ("<tool_call>\n</tool_call>Yes.", said("Yes.")),
    "a doubled tag": (f"<tool_call>\n{CALL}\n</tool_call>", said("", "", [PARIS])),
    "a call and text in its place": (
        CALL.replace("\n</", "\nThat is it.\n</"),
        said("That is it.", "", [PARIS], "ct"),
    ),
    "Coder's tags": (CODER, said("", "", [PARIS])),
    "Coder's tags, text before": (f"I look.\n{CODER}", said("I look.", "", [PARIS])),
    "Coder's tags, all in one line": (CODER.replace("\n", ""), said("", "", [PARIS])),
    "Coder's tags, several calls": (f"{CODER}\n{CODER.replace('Paris', 'Lima')}", said("", "", [PARIS, LIMA])),
    "Coder's tags, two functions in one block": (
        CODER.removesuffix("</tool_call>") + CODER.replace("Paris", "Lima").removeprefix("<tool_call>\n"),
        said("", "", [PARIS, LIMA]),
    ),
    "Coder's tags without <tool_call>": (CODER.removeprefix("<tool_call>\n"), said("", "", [PARIS])),
    "Coder's tags without any tool_call": (
        "I look.\n" + CODER.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>") + "\nDone.",
        said("I look.\nDone.", "", [PARIS], "tct"),
    ),
    "Coder's tags without </tool_call>": (CODER.removesuffix("\n</tool_call>"), said("", "", [PARIS])),
    "Coder's tags without </function>": (CODER.replace("</function>\n", ""), said("", "", [PARIS])),
    "missing </parameter>": (CODER.replace("</parameter>\n", ""), said("", "", [PARIS])),
    "missing </parameter> in one line": (CODER.replace("\n", "").replace("</parameter>", ""), said("", "", [PARIS])),
    "missing </parameter> before another": (
        CODER.replace("Paris\n</parameter>", "Paris\n<parameter=days>\n3\n</parameter>"),
        said("", "", [ToolCall("get_weather", {"city": "Paris", "days": 3})]),
    ),
    "missing </parameter> and nothing else": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis",
        said("", "", [PARIS]),
    ),
    "missing </parameter> in the first of two calls": (
        CODER.replace("</parameter>\n</function>\n", "") + "\n" + CODER.replace("Paris", "Lima"),
        said("", "", [PARIS, LIMA]),
    ),
    "missing </parameter> without any tool_call": (
        "<function=get_weather>\n<parameter=city>\nParis\n</function>",
        said("", "", [PARIS]),
    ),
    "ampersands and angle brackets": (
        CODER.replace("Paris", 'a && b < c > d "e" &amp; <b>'),
        said("", "", [ToolCall("get_weather", {"city": 'a && b < c > d "e" &amp; <b>'})]),
    ),
    "a value that is a wrong type": (
        CODER.replace("city", "days").replace("Paris", "three"),
        said("", "", [ToolCall("get_weather", {"days": "three"})]),
    ),
    "a value that talks about tags": (
        CODER.replace("get_weather", "write")
        .replace("city", "text")
        .replace("Paris", "x\n</tool_call> y\n</function>\nz"),
        said("", "", [ToolCall("write", {"text": "x\n</tool_call> y\n</function>\nz"})]),
    ),
    "a value with newlines and spaces around it": (
        CODER.replace("Paris", "\n  Paris\n"),
        said("", "", [ToolCall("get_weather", {"city": "\n  Paris\n"})]),
    ),
    "a function without parameters": (
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        said("", "", [ToolCall("now", {})]),
    ),
    "a tool that is not on offer": (
        CODER.replace("get_weather", "other"),
        said("", "", [ToolCall("other", {"city": "Paris"})]),
    ),
    "a bare function that is not on offer": ("Write <function=f> here.", said("Write <function=f> here.")),
    "any language": (
        f"<think>\n{LANGUAGES}\n</think>\n\n{LANGUAGES}\n{CALL.replace('Paris', LANGUAGES.replace(chr(0), '0'))}",
        said(LANGUAGES, LANGUAGES, [ToolCall("get_weather", {"city": LANGUAGES.replace(chr(0), "0")})]),
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_text_is_separated_into_its_parts(name: str) -> None:
    raw, expected = CORPUS[name]
    assert parse(raw, schemas=SCHEMAS) == expected


@pytest.mark.parametrize("name", CORPUS)
def test_events_do_not_depend_on_where_the_text_is_cut(name: str) -> None:
    raw, _ = CORPUS[name]
    expected = parsed(raw, schemas=SCHEMAS)
    assert parsed(*raw, schemas=SCHEMAS) == expected  # letter by letter
    for cut in range(len(raw) + 1):
        assert parsed(raw[:cut], raw[cut:], schemas=SCHEMAS) == expected


def test_events_of_random_texts_do_not_depend_on_where_they_are_cut() -> None:
    rng = random.Random(7)
    parts = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "</function>",
        "<function=write>",
        "<parameter=text>",
    ]
    parts += [
        "</parameter>",
        CALL,
        CODER,
        '{"name": "write", "arguments": {"text": "',
        '"}}',
        "\n",
        " ",
        "`",
        '"',
        "<",
        "a",
    ]
    for _ in range(1500):
        raw = "".join(rng.choices(parts, k=rng.randrange(1, 14)))
        options = {"thinking": rng.random() < 0.3, "schemas": SCHEMAS if rng.random() < 0.7 else None}
        for whole in (True, False):
            expected = parsed(raw, whole=whole, **options)
            for _ in range(3):
                assert parsed(*cuts(raw, rng), whole=whole, **options) == expected, raw


def test_tags_never_leak_even_when_cut() -> None:
    rng = random.Random(8)
    parts = ["<think>", "</think>", "</tool_call>", CALL, "\n\n", "word ", "<", "think", ">", "東"]
    for _ in range(1500):
        raw = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        if "<<" in raw or "<think" in raw.replace("<think>", ""):
            continue
        parser = ReplyParser(thinking=rng.random() < 0.3)
        out = [
            p for piece in [*cuts(raw, rng), None] for p in (parser.finish() if piece is None else parser.push(piece))
        ]
        for piece in out:
            if isinstance(piece, Text):
                assert "<think>" not in piece.text
                assert "tool_call" not in piece.text
            if isinstance(piece, Text | Reasoning):
                assert "</think>" not in piece.text


@pytest.mark.parametrize("name", ["hybrid", "thinking-2507", "coder"])
def test_what_a_template_renders_is_parsed_back(name: str) -> None:
    template = ChatTemplate({"default": (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")}, {}, Path())
    values = ["Paris", "", "a\nb", "  spaces ", '"quoted" & <b>', LANGUAGES, "back\\slash", "{", "</think>", "1"]
    rng = random.Random(9)
    for _ in range(300):
        calls = [
            ToolCall("write", {"text": rng.choice(values)} | ({"b": rng.choice(values)} if rng.random() < 0.3 else {}))
            for _ in range(rng.randrange(3))
        ]
        text = rng.choice(["", "Yes.", "a\n\nb <b> & `c`", LANGUAGES])
        thought = "" if name == "coder" else rng.choice(["", "Hm.", "a\n\n  b", LANGUAGES])
        message: dict[str, Any] = {"role": "assistant", "content": text, "reasoning_content": thought}
        message["tool_calls"] = [call.as_message() for call in calls]
        talk = [{"role": "user", "content": "?"}]
        prompt = template.render(talk)
        whole = template.render([*talk, message], add_generation_prompt=False)
        if name != "coder":
            assert whole.startswith(prompt)
        raw = whole[len(prompt) :].removesuffix("<|im_end|>\n")
        assert parse(*cuts(raw, rng), thinking=opens_thinking(prompt), schemas=SCHEMAS)[:3] == (thought, text, calls), (
            raw
        )


def test_only_the_closing_tag_is_expected_after_a_prompt_that_opens_thinking() -> None:
    assert parse("Hm.\n</think>\n\nYes.", thinking=True) == said("Yes.", "Hm.")
    assert parse("\n</think>\n\nYes.", thinking=True) == said("Yes.")
    assert parse("<think>\nHm.\n</think>\n\nYes.", thinking=True) == said("Yes.", "Hm.")
    assert parse("Hm. And so", thinking=True) == said("", "Hm. And so")


def test_a_call_that_is_cut_off_is_text() -> None:
    cut = '<tool_call>{"name": "delete", "arguments": {"path": "/home"'
    assert parse(cut, whole=True).calls == [ToolCall("delete", {"path": "/home"})]
    assert parse(cut, whole=False) == said(cut.removeprefix("<tool_call>"))
    assert parse(cut + "}}", whole=False).calls == [ToolCall("delete", {"path": "/home"})]
    tagged = "<tool_call>\n<function=delete>\n<parameter=path>\n/home"
    assert parse(tagged, whole=False) == said(tagged.removeprefix("<tool_call>\n"))
    more = tagged + "\n</parameter>\n"
    assert parse(more, whole=False).calls == []
    assert parse(more + "</function>", whole=False).calls == [ToolCall("delete", {"path": "/home"})]
    bare = tagged.removeprefix("<tool_call>\n").replace("delete", "write")
    assert parse(bare, whole=False) == said(bare)


DELETE = '<tool_call>{"name": "delete", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    "begun",
    ["<tool_call>\n<function=write>\n<parameter=text>\n", "<function=write>\n<parameter=text>\n",
     '<tool_call>{"name": "write", "arguments": {"text": "'],
)  # fmt: skip
def test_a_value_that_is_cut_off_after_a_closing_tag_is_not_a_call(begun: str) -> None:
    for rest in ("a</tool_call>", "a</tool_call> and", f"a</tool_call> and {DELETE} so"):
        for pieces in ([begun + rest], list(begun + rest)):
            assert parse(*pieces, whole=False, schemas=SCHEMAS).calls == []
    if begun.endswith("\n"):  # where the model ends by itself, it has ended the call
        assert parse(begun + "a</tool_call>", schemas=SCHEMAS).calls == [ToolCall("write", {"text": "a"})]


@pytest.mark.parametrize("whole", [True, False])
def test_a_value_with_too_many_closing_tags_is_not_run_in_part_nor_what_it_quotes(whole: bool) -> None:
    value = f"Call:\n{DELETE}\nso.\n" * 20
    tagged = CODER.replace("get_weather", "write").replace("city", "text").replace("Paris", value)
    quoted = value.replace('"', '\\"')
    json = f'<tool_call>{{"name": "write", "arguments": {{"text": "{quoted}"}}}}</tool_call>'
    for raw in (tagged, tagged.removeprefix("<tool_call>\n"), json):
        for pieces in ([raw], list(raw)):
            found = parse(*pieces, whole=whole, schemas=SCHEMAS)
            assert found.calls == []
            assert "so.\nCall:" in found.text


def test_text_comes_as_soon_as_it_cannot_be_a_tag() -> None:
    parser = ReplyParser()
    assert parser.push("Hello") == [Text("Hello")]
    assert parser.push(" wor") == [Text(" wor")]
    assert parser.push("ld <") == [Text("ld")]
    assert parser.push("th") == []
    assert parser.push("ree") == [Text(" <three")]
    assert parser.push("\n\n") == []
    assert parser.push("<think>\nso") == [Reasoning("so")]
    assert parser.push(" on</") == [Reasoning(" on")]
    assert parser.push("think>\n") == []
    assert parser.push(CALL[:-1]) == []
    assert parser.push(">") == [CallStart(0, "", "get_weather"), CallArguments(0, '{"city": "Paris"}'), PARIS]
    assert parser.finish() == []


def test_the_time_is_linear_in_the_length_of_the_text() -> None:
    hostile = [
        '<tool_call>{"' + "</tool_call>x" * 20_000,
        "<tool_call><function=write><parameter=text>" + "</tool_call>x" * 20_000,
        '<tool_call>{"</tool_call>x' * 10_000,
        "<function=write><parameter=text>\n" + "\n" * 200_000,
        "<tool_call>" + "[" * 200_000,
        "<tool_call>" + '{"a":' * 100_000,
        "<" * 200_000,
        "`<think>`" * 20_000,
        "<think>" * 50_000,
        "<parameter=" * 20_000,
        "<tool_call><function=" * 20_000,
    ]
    start = time.process_time()
    for raw in hostile:
        for size in (1000, 100_000):
            parse(*(raw[at : at + size] for at in range(0, len(raw), size)), schemas=SCHEMAS)
    assert time.process_time() - start < 30
