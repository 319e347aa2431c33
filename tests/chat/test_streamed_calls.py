"""Calls while they are written: their arguments come as they are certain, and are those of the finished call."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from reciter import GREEDY, Reciter
from reply_events import check_calls, cuts, joined, parsed

from npqwen.chat.events import CallArguments, CallStart, Event, Finish, Reasoning, Text, UnfinishedCall
from npqwen.chat.reply_parser import ReplyParser
from npqwen.tools import partial_call
from npqwen.tools.calls import ToolCall

SCHEMAS: dict[str, Any] = {
    "write": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "mode": {"enum": ["a", "w"]},
            "lines": {"type": "integer"},
            "tags": {"type": "array"},
            "any": {},
        },
    },
    "now": {"type": "object", "properties": {}},
}
STRINGS = [
    "",
    "Paris",
    " two  words ",
    "a\nb\n\n  c\t",
    "\n",
    '"quoted" and \\ back\\slash \\n',
    "`x` it's {[}] </x> <b>",
    "</tool_call> and more",
    "<think> </think>",
    "see <function=now> and </function>.\n</function>\nEnd",
    "naïve 東京 \U0001f469\u200d\U0001f467 \x00\x1f\u2028",
    "null",
    "nullable",
    " None",
    "</parame",
]
OTHERS: list[Any] = [0, -12, 2.5, True, None, [], ["a", 1, None], {"k": [{"x": "y"}]}, {}]


def hermes(call: ToolCall, rng: random.Random) -> str:
    text = json.dumps(call.arguments, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 2]))
    if rng.random() < 0.3:
        text = text.replace("\\n", "\n").replace("\\t", "\t") if "\\\\" not in text else text
    key = rng.choice(["arguments", "arguments", "parameters"])
    space = rng.choice(["", "\n"])
    form = rng.randrange(6)
    if form == 0:
        body = f'{{"{key}": {text}, "name": "{call.name}"}}'
    elif form == 1:
        body = f'{{"name": "{call.name}", "arguments": {json.dumps(text)}}}'
    else:
        body = f'{{{space}"name" : "{call.name}",{space} "{key}": {text}{space}}}'
    return f"<tool_call>{space}{body}{space}</tool_call>"


def coder(call: ToolCall, rng: random.Random) -> str:
    lines = [f"<function={call.name}>"]
    for name, value in call.arguments.items():
        spelled = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"<parameter={name}>\n{spelled}\n</parameter>"]
    text = "\n".join([*lines, "</function>"])
    # Without <tool_call> around it, the first </function> after a value's own would be the end.
    bare = text.count("</function>") == 1 and rng.random() < 0.2
    return text if bare else f"<tool_call>\n{text}\n</tool_call>"


def random_call(style: Any, rng: random.Random) -> ToolCall:
    if rng.random() < 0.2:
        return ToolCall("now", {})
    if style is hermes:
        values = [*STRINGS, *OTHERS, "</parameter>"]
        return ToolCall(
            "write", {rng.choice(["path", "a b", "é"]): rng.choice(values) for _ in range(rng.randrange(4))}
        )
    by_name: dict[str, list[Any]] = {
        "path": STRINGS,
        "text": ["Paris", "nullable", "a\nb", None],
        "mode": ["a", "w", "x"],
        "lines": [0, -12, "many"],
        "tags": [[], ["a", 1, None]],
        "any": [*OTHERS, "a b"],
    }
    names = rng.sample(list(by_name), k=rng.randrange(4))
    return ToolCall("write", {name: rng.choice(by_name[name]) for name in names})


def random_reply(rng: random.Random) -> tuple[str, list[Any]]:
    """A text, and its events without pieces of calls."""
    raw = ""
    expected: list[Any] = []
    if rng.random() < 0.5:
        raw = "<think>\nI call <tool_call> soon\n</think>\n\n"
        expected = [Reasoning("I call <tool_call> soon")]
    style = rng.choice([hermes, coder])
    begun = False
    for _ in range(rng.randrange(4)):
        if rng.random() < 0.4:
            raw += "It's `so`.\n"
            expected.append(Text(("\n" if begun else "") + "It's `so`."))
            begun = True
        call = random_call(style, rng)
        raw += style(call, rng) + rng.choice(["", "\n"])
        expected.append(call)
    if rng.random() < 0.3:
        raw += "Done."
        expected.append(Text(("\n" if begun and isinstance(expected[-1], ToolCall) else "") + "Done."))
    return raw, joined(expected)


def whole(events: list[Any]) -> list[Any]:
    return [event for event in events if not isinstance(event, CallStart | CallArguments)]


def test_every_split_of_a_text_gives_the_same_events_and_calls() -> None:
    rng = random.Random(16)
    for _ in range(40):
        raw, expected = random_reply(rng)
        events = parsed(raw, schemas=SCHEMAS)
        assert whole(events) == expected, raw
        for cut in range(len(raw) + 1):
            assert parsed(raw[:cut], raw[cut:], schemas=SCHEMAS) == events, raw


def test_random_splits_and_single_characters_give_the_same_events_and_calls() -> None:
    rng = random.Random(17)
    for _ in range(300):
        raw, expected = random_reply(rng)
        events = parsed(*raw, schemas=SCHEMAS)
        assert whole(events) == expected, raw
        for _ in range(3):
            assert parsed(*cuts(raw, rng), schemas=SCHEMAS) == events, raw


def test_damaged_and_cut_off_texts_have_the_calls_that_they_have_without_streaming(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(18)
    for _ in range(700):
        raw, _ = random_reply(rng)
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(raw) + 1)
            new = rng.choice(["", "", '"', "}", "{", "\\", "\\ud83d", "</tool_call>", "</parameter>", "<", "\n", "NaN"])
            raw = raw[:at] + new + raw[at + rng.randrange(9) :]
        raw = raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.5 else raw
        complete = rng.random() < 0.5
        events = parsed(*cuts(raw, rng), schemas=SCHEMAS, whole=complete)
        assert parsed(*raw, schemas=SCHEMAS, whole=complete) == events, raw
        with monkeypatch.context() as patch:
            patch.setattr(partial_call, "_LONGEST_START", 0)
            late = parsed(raw, schemas=SCHEMAS, whole=complete)
        assert not any(isinstance(event, UnfinishedCall) for event in late)
        assert [event for event in events if isinstance(event, ToolCall)] == [
            event for event in late if isinstance(event, ToolCall)
        ], raw
        if not any(isinstance(event, UnfinishedCall) for event in events):
            texts = ["".join(e.text for e in found if isinstance(e, Text)) for found in (events, late)]
            assert texts[0] == texts[1], raw


def test_a_call_that_is_cut_off_has_the_beginning_of_its_arguments() -> None:
    rng = random.Random(19)
    begun = 0
    for style in (hermes, coder):
        for _ in range(50):
            call = random_call(style, rng)
            raw = style(call, rng)
            full = "".join(event.text for event in parsed(raw, schemas=SCHEMAS) if isinstance(event, CallArguments))
            for cut in range(len(raw)):
                for event in parsed(raw[:cut], schemas=SCHEMAS, whole=False):
                    if isinstance(event, UnfinishedCall):
                        assert event.name == call.name
                        assert full.startswith(event.arguments)
                        begun += 1
                    elif isinstance(event, ToolCall):
                        assert event == call
    assert begun > 500


HERMES = '<tool_call>\n{"name": "write", "arguments": {"path": "a\nb", "lines": 12}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=write>\n<parameter=path>\na\nb\n</parameter>\n<parameter=lines>\n12\n</parameter>\n"
    "</function>\n</tool_call>"
)
WRITE = ToolCall("write", {"path": "a\nb", "lines": 12})


def steps(raw: str) -> list[tuple[str, str]]:
    """Which text brought which piece of the call."""
    parser = ReplyParser(schemas=SCHEMAS)
    found, last = [], 0
    for at, letter in enumerate(raw, 1):
        for event in parser.push(letter):
            piece = event.name if isinstance(event, CallStart) else getattr(event, "text", "end")
            if piece == "end" or isinstance(event, CallStart) or raw[last:at].strip():
                found.append((raw[last:at], piece))
                last = at
            else:
                found[-1] = (found[-1][0], found[-1][1] + piece)
    return found


def test_arguments_in_json_come_as_they_are_written() -> None:
    found = steps(HERMES)
    assert found[:2] == [('<tool_call>\n{"name": "write", "arguments": {', "write{"), ('"', '"')]
    assert ("h", "h") in found
    assert found[-1] == ("}\n</tool_call>", "end")
    assert "".join(piece for _, piece in found[:-1]) == 'write{"path": "a\\nb", "lines": 12}'


def test_strings_in_tags_come_as_they_are_written_and_other_values_at_their_end() -> None:
    found = steps(CODER)
    assert found[0] == ("<tool_call>\n<function=write>\n<parameter=path>", 'write{"path": ')
    assert found[1] == ("\na", '"a')
    assert found[2] == ("\nb", "\\nb")
    assert found[3] == ("\n</parameter>", '"')
    assert found[4] == ("\n<parameter=lines>", ', "lines": ')
    assert found[5] == ("\n12\n</parameter>", "12")
    assert found[6] == ("\n</function>", "}")
    assert found[7] == ("\n</tool_call>", "end")


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"path": "\\ud83d\\ude00 \\ud83d \\ude00 \\u00e9 \\/"}', {"path": "😀 ? ? é /"}),
        ('{"path": "\\ud83d\\u0041\\ud83d\\ud83d\\ude00"}', {"path": "?A?😀"}),
        ('{"path": "a\r\n\tb\x01"}', {"path": "a\r\n\tb\x01"}),
        ('{"path": "1", "path": "2"}', {"path": "2"}),
        ('{ "a" : 1e2 , "b" : [ ] }', {"a": 100.0, "b": []}),
    ],
)
def test_arguments_are_valid_json_where_a_models_json_is_not(body: str, arguments: dict[str, Any]) -> None:
    raw = f'<tool_call>{{"name": "write", "arguments": {body}}}</tool_call>'
    events = parsed(*raw, schemas=SCHEMAS)
    assert whole(events) == [ToolCall("write", arguments)]
    assert parsed(raw, schemas=SCHEMAS) == events


@pytest.mark.parametrize("missing", [1, 2, 3, 4])
def test_brackets_that_are_missing_at_the_end_are_added(missing: int) -> None:
    raw = '<tool_call>{"name": "write", "arguments": {"a": [1, {"b": "]}"}]}}'[:-missing]
    for end in ("</tool_call>", ""):
        events = parsed(*raw, end, schemas=SCHEMAS)
        assert whole(events) == [ToolCall("write", {"a": [1, {"b": "]}"}]})]


@pytest.mark.parametrize(
    "raw",
    [
        '<tool_call>{"arguments": {}, "name": "write"}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "write", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>[{"name": "write", "arguments": {"a": 1}}]</tool_call>',
        '<tool_call>\n```json\n{"name": "write", "arguments": {"a": 1}}\n```\n</tool_call>',
        "<tool_call><function=other><parameter=a>1</parameter></function></tool_call>",
        "<tool_call>Well: <function=write></function></tool_call>",
    ],
)
def test_calls_of_other_forms_come_at_their_end(raw: str) -> None:
    parser = ReplyParser(schemas=SCHEMAS)
    assert [event for letter in raw[:-1] for event in parser.push(letter)] == []
    events = parser.push(raw[-1])
    check_calls(events)
    assert [type(event) for event in events if not isinstance(event, Text)] == [CallStart, CallArguments, ToolCall]


def test_nothing_after_a_closing_tag_in_a_value_comes_before_the_calls_end() -> None:
    raw = '<tool_call>{"name": "write", "arguments": {"path": "a</tool_call>b"}}</tool_call>'
    parser = ReplyParser(schemas=SCHEMAS)
    early = joined(event for letter in raw[:-1] for event in parser.push(letter))
    assert early == [CallStart(0, "", "write"), CallArguments(0, '{"path": "a')]
    assert parser.push(">") == [CallArguments(0, '</tool_call>b"}'), ToolCall("write", {"path": "a</tool_call>b"})]


def test_a_call_that_breaks_after_its_start_is_unfinished_and_not_text() -> None:
    broken = '<tool_call>{"name": "write", "arguments": {"path": "C:\\d"}}</tool_call>'
    events = parsed(broken + HERMES + "Done.", schemas=SCHEMAS)
    start = UnfinishedCall(0, "", "write", '{"path": "C:\\d"}')
    assert whole(events) == [start, WRITE, Text("Done.")]
    assert parsed(broken) == [Text(broken.removeprefix("<tool_call>").removesuffix("</tool_call>"))]
    renamed = '<tool_call>{"name": "write", "arguments": {}, "name": "now"}</tool_call>'
    assert whole(parsed(renamed, schemas=SCHEMAS)) == [UnfinishedCall(0, "", "write", "{}"), ToolCall("now", {})]


def tools() -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": of}} for name, of in SCHEMAS.items()]


@pytest.mark.parametrize("raw", [HERMES, CODER])
def test_a_chats_events_have_the_ids_of_its_calls(raw: str) -> None:
    options: dict[str, Any] = {"tools": tools(), "thinking": False, "seed": 1}
    events: list[Event] = list(Reciter(f"Yes.\n{raw}\n{raw}", sampling=GREEDY).stream_chat("?", **options))
    check_calls(events[:-1])
    finish = events[-1]
    assert isinstance(finish, Finish)
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert finish.reply.tool_calls == calls
    assert [call.arguments for call in calls] == [WRITE.arguments] * 2
    assert len({call.id for call in calls} - {""}) == 2
    assert len([event for event in events if isinstance(event, CallArguments)]) > 6
    assert finish.reply.text == "Yes."
    assert finish.reply.unfinished_calls == []


@pytest.mark.parametrize("raw", [HERMES, CODER])
def test_a_chats_call_that_is_cut_off_is_in_the_reply_but_not_in_its_text_calls_or_messages(raw: str) -> None:
    model = Reciter(f"Yes.\n{raw}\n{raw}", sampling=GREEDY)
    length = len(model.tokenizer.encode(f"Yes.\n{raw}\n{raw}")) - len(model.tokenizer.encode(raw)) // 3
    stream = model.stream_chat("?", tools=tools(), thinking=False, max_tokens=length)
    events = list(stream)
    check_calls(events[:-1])
    reply = stream.reply
    assert reply is not None
    assert (reply.text, reply.finish_reason, len(reply.tool_calls)) == ("Yes.", "length", 1)
    (unfinished,) = reply.unfinished_calls
    assert events[-2] == unfinished
    assert (unfinished.index, unfinished.name) == (1, "write")
    assert unfinished.id not in ("", reply.tool_calls[0].id)
    assert unfinished.arguments.startswith('{"path": "a')
    (message,) = reply.messages
    assert message["content"] == "Yes."
    assert [call["id"] for call in message["tool_calls"]] == [reply.tool_calls[0].id]


def test_reading_a_long_call_takes_time_linear_in_its_length() -> None:
    begin = "<tool_call><function=write><parameter=path>"
    json_begin = '<tool_call>{"name": "write", "arguments": {"path": "'
    hostile = [
        begin + "x\n" * 50_000,
        begin + "\n" * 100_000,
        begin + "<parameter=" * 10_000,
        begin + "a</parameter>" + "<parameter=" * 10_000,
        begin + "a</parameter>" + "<parameter=b>" * 8_000,
        begin + "a</parameter>" + "<parameter=b>c</parameter>" * 4_000,
        begin + "</functio" * 10_000,
        json_begin + "\n" * 100_000,
        json_begin + "\\ud83d" * 20_000,
        json_begin + '", "' * 25_000,
        json_begin + '": ' + '{"a":' * 20_000,
        '<tool_call>{"name": "' + "a" * 100_000,
    ]
    start = time.process_time()
    for raw in hostile:
        parsed(*(raw[at : at + 50] for at in range(0, len(raw), 50)), schemas=SCHEMAS)
    assert time.process_time() - start < 30
