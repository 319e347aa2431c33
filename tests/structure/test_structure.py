"""What a text must be: the values of the options, and what is refused, with one clear line and in bounded time."""

from __future__ import annotations

import gc
import json
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY
from reciter import TOKENIZER, recite

from npqwen.errors import OptionError
from npqwen.generation.generate import generate, stream
from npqwen.generation.options import OPTIONS, check_options
from npqwen.structure import constraint
from npqwen.structure.grammar_text import language, literal
from npqwen.structure.regex_text import narrowed_classes
from npqwen.structure.structure import MAX_SIZE, Structure, narrowed, reason
from npqwen.structure.vocabulary import vocabulary_of
from npqwen.tokenizer import Tokenizer


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


CYCLE: dict[str, Any] = {}
CYCLE["items"] = CYCLE
REFUSED: list[tuple[str, Any, str]] = [
    ("schema", 5, "schema is 5; it must be a dictionary with a JSON schema, a class such as a dataclass or a pydantic"),
    ("schema", "{}", "schema is '{}'; it must be a dictionary"),
    ("schema", False, "schema is False; it must be a dictionary"),
    ("schema", {"type": "objekt"}, "schema cannot be used: Invalid type: objekt"),
    (
        "schema", {"type": "array", "uniqueItems": True},
        'Unimplemented keys: ["uniqueItems"]; remove them, or ignore them with',
    ),
    ("schema", {"$ref": "#/$defs/no"}, "schema cannot be used: Pointer '/$defs/no' does not exist"),
    (
        "schema", {"type": "integer", "minimum": 5, "maximum": 3},
        "Unsatisfiable schema: minimum (5) is greater than maximum (3)",
    ),
    (
        "schema", {"type": "string", "pattern": "a(?=b)"},
        "look-around, including look-ahead and look-behind, is not supported",
    ),
    ("schema", {"const": float("nan")}, "schema has a number that JSON does not have"),
    ("schema", {"a": {1, 2}}, "schema['a'] is of type set, which is not a JSON value"),
    ("schema", {1: 2}, "schema has a key that is not a string"),
    ("schema", CYCLE, "... is nested more than 128 levels deep"),
    ("schema", nested(200), "... is nested more than 128 levels deep"),
    ("schema", {"x-guidance": {"no": 1}}, "unknown field `no`"),
    (
        "schema", {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
        "schema cannot be used: schema too large",
    ),
    ("schema", {"enum": ["x" * MAX_SIZE]}, "schema has 1,048,7"),
    ("regex", "(a", "regex cannot be used: unclosed group"),
    ("regex", "a{2,1}", "regex cannot be used: invalid repetition count range"),
    ("regex", r"(a)\1", "regex cannot be used: backreferences are not supported"),
    ("regex", "", "regex is empty"),
    ("regex", 5, "regex is 5; it must be a string, a regular expression"),
    ("regex", "(" * 5000 + "a" + ")" * 5000, "regex cannot be used: "),
    ("regex", "a" * (MAX_SIZE + 1), "regex has 1,048,577 characters; the limit is 1,048,576"),
    ("choice", "yes", "choice is 'yes'; it must be a sequence of strings that are not empty"),
    ("choice", [], "choice is []; it must be a sequence of strings that are not empty"),
    ("choice", ["a", ""], "choice is ['a', '']; it must be a sequence of strings that are not empty"),
    ("choice", [1], "choice is [1]; it must be"),
    ("choice", ["\ud800"], "choice is not valid Unicode"),
    ("grammar", "hello", "grammar begins with 'hello'; it must be a Lark grammar"),
    ("grammar", "", "grammar begins with ''; it must be a Lark grammar"),
    ("grammar", "start: foo", 'grammar cannot be used: at 1(8): unknown name: "foo"'),
    ("grammar", "root ::= foo", "grammar cannot be read as GBNF: Rule 'foo' not found"),
    ("grammar", 'x ::= "a"', "grammar cannot be read as GBNF: No 'root' rule found"),
    (
        "grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
        "grammar cannot be read as GBNF: maximum recursion depth",
    ),
    ("grammar", {"a": 1}, "grammar is {'a': 1}; it must be a string, a Lark or GBNF grammar"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_used_is_refused_before_there_is_a_model(name: str, value: Any, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(OptionError) as refused:
        check_options({name: value})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert time.perf_counter() - start < 60  # they are bombs: without limits they would take forever


BOMBS: list[dict[str, Any]] = [
    {"regex": "[^\\s\\S]"},  # no text at all
    {"regex": "a{1000}{1000}"},
    {"regex": "(a|aa|aaa){1000000}"},
    {"regex": "(((a{100}){100}){100}){100}"},
    {"regex": "(a?){3000}a{3000}"},
    {"grammar": "start: start"},
    {"grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"'},
    {"schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"schema": {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
]


@pytest.mark.parametrize("options", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_gives_an_error_or_a_text_of_bounded_length(options: dict[str, Any]) -> None:
    start, problem = time.perf_counter(), ""
    try:
        done = generate(recite("a" * 50), "x", max_tokens=20, **options)
    except OptionError as error:
        problem = str(error)
    if problem:
        assert "\n" not in problem
        assert "<state>" not in problem
        assert next(iter(options)) in problem
    else:
        assert len(done.ids) <= 20
    assert time.perf_counter() - start < 60


AMBIGUOUS = "start: s\ns: s s | s s s | c\nc: /[a-z ]/"


def test_a_grammar_with_too_many_readings_ends_the_text() -> None:
    start = time.thread_time()
    with pytest.raises(OptionError, match=r"grammar cannot be followed: a text can follow it in too many ways; make"):
        generate(recite("the cat sat on the mat and " * 20), "x", grammar=AMBIGUOUS)
    assert time.thread_time() - start < 5


def test_a_text_whose_tokens_take_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def thread_time(self) -> float:
            self.now += 0.5  # what every call of the matcher takes
            return self.now

    monkeypatch.setattr(constraint, "time", Clock())
    model = recite("a" * 50)
    with pytest.raises(OptionError, match="regex cannot be followed: a text can follow it in too many ways"):
        generate(model, "x", regex="a+")
    assert 0 < len(model.calls) < 5
    monkeypatch.setattr(constraint, "TOKEN_SECONDS", 1.5)  # which two or three calls take
    assert generate(recite("a" * 50), "x", regex="a{50}").text == "a" * 50


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("schema", {"$ref": "#"}, "no text can have this structure"),
        ("schema", {"type": "number", "multipleOf": 0.01, "minimum": 3.141, "maximum": 3.159}, "no text can have"),
        ("regex", "[^\x00-\U0010ffff]", "no text can have this structure"),
        ("grammar", "start: start", "no text can have this structure"),
    ],
    ids=["ref", "multiple", "class", "rule"],
)
def test_what_only_a_vocabulary_shows_is_refused_in_plain_words(option: str, value: Any, problem: str) -> None:
    structure = Structure.of(check_options({option: value}))
    assert structure is not None
    with pytest.raises(OptionError) as refused:
        vocabulary_of(TOKENIZER, 4128, {4098}).compiled(structure)
    assert str(refused.value).startswith(f"{option} cannot be used: {problem}")


def test_what_llguidance_says_about_itself_is_not_repeated() -> None:
    large = "it has too many rules and alternatives; make it smaller"
    assert reason("panic: assertion failed: grammar.symbols.len() < u16::MAX\n<backtrace>\n   0: <unknown>") == large
    assert reason("at 1(8): grammar size (number of symbols) too big (limit for this grammar: 5)\n  1 | s") == large
    assert reason("Wrong: x\n<non-verbose/>") == reason("Wrong: x\n<state>\nTokens: y") == "Wrong: x"


def test_errors_come_before_anything_is_computed() -> None:
    model = recite("a")
    with pytest.raises(OptionError, match="regex cannot be used"):
        stream(model, "x", regex="[^\\s\\S]")
    with pytest.raises(OptionError, match="unknown special token"):
        stream(model, "x", grammar="start: <nonsense>")
    assert model.calls == []


def test_at_most_one_structure() -> None:
    with pytest.raises(OptionError, match="regex and choice exclude each other; give one of them"):
        check_options({"choice": ["a"], "regex": "a"})
    assert check_options({"choice": None, "regex": "a"}) == {"regex": "a"}


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    new: list[Any] = [{"schema": {"title": "new"}}, {"regex": "new+"}, {"choice": ["new"]}, {"grammar": 'start: "new"'}]
    for options in new:
        with pytest.raises(OptionError, match=r'pip install "npqwen\[grammar\]"'):
            check_options(options)


def test_any_object_is_true() -> None:
    structure = Structure.of({"schema": True})
    assert structure is not None
    assert json.loads(structure.grammar)["grammars"][0]["json_schema"]["type"] == "object"
    done = generate(recite('{"a": [1, {"b": null}], "c": "d"}'), "x", schema=True)
    assert done.parsed == {"a": [1, {"b": None}], "c": "d"}


def test_objects_have_the_listed_properties_only_unless_the_schema_says_otherwise() -> None:
    item: dict[str, Any] = {"type": "object", "properties": {"a": {}}}
    assert narrowed(item)["additionalProperties"] is False
    assert narrowed({"type": "array", "items": item})["items"]["additionalProperties"] is False
    assert narrowed({"properties": {"properties": item}})["properties"]["properties"]["additionalProperties"] is False
    for open_one in ({**item, "additionalProperties": True}, {"type": "object"}, {"const": item}, {"enum": [item]}):
        assert narrowed(open_one) == open_one
    both = {"allOf": [item, {"properties": {"b": {}}}]}
    assert narrowed(both) == both
    assert "additionalProperties" not in item


def accepts(text: str, **option: Any) -> bool:
    """Whether a text with the structure that an option requires can be this one."""
    structure = Structure.of(check_options(option))
    assert structure is not None
    constraint = vocabulary_of(TOKENIZER, 4128, {4098}).constraint(structure)
    for id in TOKENIZER.encode(text):
        if not constraint.allowed()[id // 32] >> np.uint32(id % 32) & 1:
            return False
        constraint.push(id)
    return constraint.complete


A, B = ({"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab")
KIND: dict[str, Any] = {"type": "object", "properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]}


@pytest.mark.parametrize(
    "schema",
    [
        {**KIND, "anyOf": [A, B]},
        {**KIND, "anyOf": [B, {"anyOf": [A, {"type": "object", "required": ["kind"]}]}]},
        {**KIND, "$ref": "#/$defs/a", "$defs": {"a": A}},
        {"anyOf": [KIND], "oneOf": [A, B], "x-guidance": {"coerce_one_of": True}},
        {
            "type": "object",
            "properties": {"kind": {"type": "string"}, "a": {"type": "integer"}},
            "anyOf": [{"properties": {"kind": {"const": "x"}}, "required": ["a"]}, {"required": ["b"]}],
        },
    ],
)
def test_schemas_of_one_object_do_not_forbid_each_others_properties(schema: dict[str, Any]) -> None:
    assert accepts('{"kind": "x", "a": 1}', schema=schema)
    assert not accepts('{"kind": 1, "a": 1}', schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [A, B]},
        {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": A}},
        {"$ref": "#/$defs/a", "$defs": {"a": A}, "description": "an a"},
        {**A, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    ],
)
def test_one_of_several_schemas_has_the_listed_properties_only(schema: dict[str, Any]) -> None:
    assert accepts('{"a": 1}', schema=schema)
    assert not accepts('{"a": 1, "c": 2}', schema=schema)


def test_a_property_that_is_required_but_not_listed_may_be_anything() -> None:
    schema = {**KIND, "required": ["kind", "b"]}
    assert accepts('{"kind": "x", "b": [1]}', schema=schema)
    assert not accepts('{"kind": "x"}', schema=schema)


def test_integers_have_at_most_18_digits_unless_the_schema_says_otherwise() -> None:
    done = generate(recite("1" * 50), "x", schema={"type": "integer"})
    assert done.text == "1" * 18
    assert (
        generate(recite("1" * 50), "x", schema={"type": "integer", "minimum": 0}, max_tokens=40).finish_reason
        == "length"
    )


N = 1234567890123456789


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"const": N}, f"schema has {N} as const, of which the last digits would be lost; write it as a string"),
        ({"enum": ["a", -(2**63)]}, f"schema has {-(2**63)} as enum"),
        ({"properties": {"a": {"const": {"b": [1, {"c": 2**53 + 1}]}}}}, f"schema has {2**53 + 1} as const"),
        ({"$ref": "#/other/a", "other": {"a": {"const": 2**64}}}, f"schema has {2**64} as const"),
        ({"const": 10**400}, "as const, of which"),
        ({"type": "integer", "minimum": 10**30}, f"schema has {10**30} as minimum"),
        ({"type": "integer", "maximum": -(10**30)}, f"schema has -{10**30} as maximum"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, f"{2**53} as exclusiveMinimum, of which the last digits"),
        ({"type": "integer", "minimum": N, "maximum": N}, f"choose one from {1 - 2**53} to {2**53 - 1}"),
        ({"type": "integer", "multipleOf": 10**7}, "schema has 10000000 as multipleOf; choose one of at most 1,0"),
        ({"type": "number", "multipleOf": 0.12345678}, "schema has 0.12345678 as multipleOf"),
    ],
)
def test_numbers_that_would_be_rounded_are_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        check_options({"schema": schema})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "value", [0, 2**53 - 1, 1 - 2**53, 0.1, [1, {"a": 9007199254740991}], {"minimum": -5}, {"const": [2**40]}]
)
def test_numbers_of_a_schema_are_written_to_the_digit(value: Any) -> None:
    assert generate(recite(""), "x", schema={"const": value}, max_tokens=50).text == json.dumps(value)
    assert generate(recite(""), "x", schema={"enum": [value]}, max_tokens=50).text == json.dumps(value)


def test_bounds_of_64_bits_allow_any_integer_of_18_digits() -> None:
    for low, high in ((-(2**63), 2**63 - 1), (0, 2**64 - 1), (-(10**30), 10**30)):
        schema = {"type": "integer", "minimum": low, "maximum": high, "default": 2**64}
        assert accepts(str(10**18 - 1), schema=schema)
        assert accepts(str(1 - 10**18), schema=schema) == (low < 0)
        assert not accepts(str(2**63), schema=schema)
    assert accepts(str(10**16), schema={"type": "integer", "minimum": 10**16})
    assert not accepts(str(10**16 - 1), schema={"type": "integer", "minimum": 10**16})
    assert accepts('{"maximum": 5}', schema={"properties": {"maximum": {"type": "integer", "maximum": 2**63}}})


def test_the_users_own_blanks_come_first() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}
    assert generate(recite(""), "x", schema=schema).text == '{"a": 1, "b": 2}'
    compact = {**schema, "x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert generate(recite(""), "x", schema=compact).text == '{"a":1,"b":2}'


@pytest.mark.parametrize(
    ("regex", "wide", "ascii"),
    [
        (r"\d+", "[0-9]+", "[0-9]+"),
        (r"[\d.]\.\\d", r"[0-9.]\.\\d", r"[0-9.]\.\\d"),
        (r"[^]\w]\w", r"[^]\p{L}\p{N}_][\p{L}\p{N}_]", "[^]0-9A-Za-z_][0-9A-Za-z_]"),
        (r"\[\d[\]\d]\D", r"\[[0-9][\]0-9]\D", r"\[[0-9][\]0-9]\D"),
    ],
)
def test_classes_of_a_regex_have_what_is_in_them_everywhere(regex: str, wide: str, ascii: str) -> None:
    assert narrowed_classes(regex, ascii=False) == wide
    assert narrowed_classes(regex, ascii=True) == ascii


@pytest.mark.parametrize(
    ("characters", "right", "wrong"),  # as JavaScript has them
    [
        (r"[\w-z]", "5Gz_-", "`."),
        (r"[\w-\.]", "a-.", "+/"),
        (r"[+-\d]", "+-7", ",./"),
        (r"[\s-\S]", "a- ", ""),
        (r"[^\W-a]", "bZ_0", "a-."),
        (r"[\d-a-z]", "5a-z", "b"),
        (r"[\w--.]", "q-.", "+/"),
        (r"[a-c\d-]", "b4-", "d."),
        (r"[-\d+--/]", "-3+,/", ".*"),
    ],
)
def test_a_hyphen_beside_a_set_of_characters_is_literal(characters: str, right: str, wrong: str) -> None:
    for character in right + wrong:
        assert accepts(character, regex=characters) == (character in right), character
        schema = {"type": "string", "pattern": f"^{characters}$"}
        assert accepts(f'"{character}"', schema=schema) == (character in right), character


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('start: "a"', "lark"),
        ('// ::=\n?start: "root ::="', "lark"),
        ('%llguidance {}\nstart: "a"', "lark"),
        ('start[capture]: "a"', "lark"),
        ('\n# start: "x"\nroot ::= "start: "', "gbnf"),
        ('root::="a"', "gbnf"),
        ('root\n  ::= "a"', "gbnf"),
        ("my-rule ::= [a-z]", "gbnf"),
    ],
)
def test_lark_and_gbnf_are_told_apart_by_the_first_rule(text: str, expected: str) -> None:
    assert language(text) == expected


def test_escapes_of_gbnf_are_those_of_llama_cpp() -> None:
    grammar = 'root ::= "\\x41\\u00e9\\U0001F389\\"\\\\n\\x22\\u005C\\x7f\\x01" [\\x42] "\\n"'
    assert generate(recite(""), "x", grammar=grammar).text == 'Aé🎉"\\n"\\\x7f\x01B\n'


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (r"root ::= [\u0041\u00e9\U0001F600-\U0001F64F]", "Aé😀😎", "aeu0"),
        (r"root ::= [^\u005d\x41\U0000002d]", "a[\\u", "]A-"),
        (r"root ::= [a\-c]", "a-c", "b\\"),
        (r"root ::= [a&&c~~e][-a]?", "a&c~e", "b-"),
        (r'root ::= . | "." "x"', ".a\n\u2028😀", ""),
        ('root ::= ["./#]  # a "comment" [with.', '"./#', "x"),
    ],
)
def test_characters_of_gbnf_are_those_of_llama_cpp(grammar: str, right: str, wrong: str) -> None:
    for character in right + wrong:
        assert accepts(character, grammar=grammar) == (character in right), character


@pytest.mark.parametrize(
    "text", ['a"b\\c\n\t\r', "\x00\x07\u200b\u2028\U0010ffff 🎉é", "\x7f\\\x7f\x80", "x{1}", "%json @a <b> /c/ //d"]
)
def test_any_text_can_be_a_choice(text: str) -> None:
    assert literal(text)[0] == literal(text)[-1] == '"'
    assert generate(recite(""), "x", choice=[text]).text == text


@pytest.mark.parametrize("text", ["\u212b", "re\u0301sume\u0301", "<think>", "use <tool_call> here", "<|im_end|>"])
def test_text_that_is_not_normalized_or_names_tokens_can_be_required(text: str) -> None:
    assert generate(recite(""), "x", choice=[text]).text == text
    pattern = text.replace("|", "[|]")
    assert generate(recite(""), "x", regex=f"({pattern}|{pattern}s)").text == text
    schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
    assert generate(recite(""), "x", schema=schema).parsed == {text: text}


def test_a_tokenizer_is_freed_with_its_vocabulary() -> None:
    tokenizer = Tokenizer.from_directory(TINY)
    vocabulary_of(tokenizer, 4128, {4098})
    freed = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert freed() is None


def test_a_vocabulary_is_made_once_and_keeps_compiled_structures() -> None:
    vocabulary = vocabulary_of(TOKENIZER, 4128, {4098})
    assert vocabulary_of(TOKENIZER, 4128, frozenset({4098})) is vocabulary
    structure = Structure.of({"regex": "only here"})
    assert structure is not None
    assert vocabulary.compiled(structure) is vocabulary.compiled(structure)
    one, other = vocabulary.constraint(structure), vocabulary.constraint(structure)
    for id in one.forced():
        one.push(id)
    assert one.ended
    assert not other.ended


def test_files_and_texts_on_the_command_line(tmp_path: Path) -> None:
    read = OPTIONS["schema"].parse
    (tmp_path / "s.json").write_text('{"type": "integer"}', encoding="utf-8")
    assert read(str(tmp_path / "s.json")) == {"type": "integer"}
    assert read('{"type": "integer"}') == {"type": "integer"}
    assert read("json") is True
    (tmp_path / "g").write_text('root ::= "a"', encoding="utf-8")
    assert OPTIONS["grammar"].parse(str(tmp_path / "g")) == 'root ::= "a"'
    (tmp_path / "bad").write_bytes(b"\xff{")
    (tmp_path / "cut").write_text('{\n"type":', encoding="utf-8")
    (tmp_path / "list").write_text("[1]", encoding="utf-8")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(5 << 20)
    for name, message in {
        "missing": "cannot be read: No such file or directory",
        ".": "cannot be read: ",
        "bad": "bad is not UTF-8 (at byte 0)",
        "cut": "is not JSON: Expecting value at line 2",
        "list": r"schema is [1]; it must be a dictionary",
        "large": "is larger than 4 MB",
    }.items():
        with pytest.raises(OptionError) as refused:
            read(str(tmp_path / name))
        assert message in str(refused.value)
    with pytest.raises(OptionError, match="is not JSON: Expecting property name"):
        read("{oops}")
    with pytest.raises(OptionError, match="its name is not valid"):
        read("\0")


@pytest.mark.parametrize("option", ["regex", "grammar"])
def test_half_a_surrogate_pair_is_refused(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} is not valid Unicode"):
        check_options({option: 'root ::= "\ud800"'})
