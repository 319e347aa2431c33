"""Chat templates that fail, take too much time or memory, or do not compile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from npqwen.chat import template_limits, template_sandbox
from npqwen.chat.chat_template import ChatTemplate
from npqwen.errors import CheckpointError, OptionError

HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages.nothing.more }}",
        "{{ [1, 2].append(3) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(OptionError, match="the chat template refuses"):
        ChatTemplate({"default": source}, {}, Path()).render(HI)


NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = OP %}{% endfor %}{{ n.x }}"
FILTERS = (
    "string", "join", "pprint", "e", "escape", "urlencode", "upper", "lower", "title", "trim", "capitalize",
    "striptags", "wordcount", "safe",
)  # fmt: skip
LISTS = "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = OP %}{% endfor %}{{ n.x | tojson }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (NESTED, "it takes more than 0.101 seconds"),
        ("{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(60) }}", "seconds|recursion"),
        ("{% for a in range(99999) recursive %}{{ loop(range(9)) }}{% endfor %}", "seconds|recursion"),
        ("{{ 7 ** (10 ** 8) }}", "a number of more than 10,000 bits"),
        ("{{ 7 * (2 ** 9999) * (2 ** 9999) }}", "a number of more than 10,000 bits"),
        ("{{ 'a' * 3000000000 }}", "a text or list of more than 50"),
        ("{{ 3000000000 * [1] }}", "a text or list of more than 50"),
        ("{{ '{:>2000000000}'.format(1) }}", "it formats with a width"),
        ("{{ '{:>{}}'.format(1, 2000000000) }}", "it pads or indents by more than 10,000"),
        ("{{ '{:>{w}}'.format_map({'w': 2000000000}) }}", "it pads or indents by more than 10,000"),
        ("{{ '%2000000000d' % 1 }}", "it formats with a width"),
        ("{{ '%*d' % (2000000000, 1) }}", "it pads or indents by more than 10,000"),
        ("{{ '%2000000000d' | format(1) }}", "it formats with a width"),
        ("{{ 'a'.ljust(3000000000) }}", "it pads or indents by more than 10,000"),
        ("{{ 'a'['zfill'](3000000000) }}", "it pads or indents by more than 10,000"),
        ("{{ '\t'.expandtabs(tabsize=3000000000) }}", "it pads or indents by more than 10,000"),
        ("{{ 'a' | center(3000000000) }}", "it pads or indents by more than 10,000"),
        ("{{ 'a\nb' | indent(width=3000000000) }}", "it pads or indents by more than 10,000"),
        ("{{ {'a': [1]} | tojson(indent=100000000) }}", "it pads or indents by more than 10,000"),
        ("{{ [1] | batch(3000000000, 0) | list }}", "it pads or indents by more than 10,000"),
        ("{{ [1] | slice(50000000) | list }}", "it pads or indents by more than 10,000"),
        (DOUBLED.replace("OP", "n.x + n.x"), "a text or list of more than 50"),
        (DOUBLED.replace("OP", "n.x ~ n.x"), "a text or list of more than 50"),
        (DOUBLED.replace("OP", "n.x.replace('a', n.x)"), "a text or list of more than 50"),
        (DOUBLED.replace("OP", "n.x | replace('b', n.x)"), "a text or list of more than 50"),
        (DOUBLED.replace("OP", "n.x.join([n.x, n.x, n.x])"), "a text or list of more than 50"),
        (DOUBLED.replace("OP", "[n.x, n.x] | join"), "a text or list of more than 50"),
        (DOUBLED.replace("OP", "n.x.translate({97: n.x})"), "translate is not available"),
        (LISTS.replace("OP", "n.x + n.x"), "seconds|a text or list of more than 50"),
        (LISTS.replace("OP", "[n.x, n.x]"), "a text or list of more than 50"),
        *(
            (LISTS.replace("OP", "[n.x, n.x]").replace("n.x | tojson", use), "a text or list of more than 50")
            for use in (
                ["n.x", "n.x ~ 'a'", "'%s' % n.x", "'{}'.format(n.x)", "'{a}'.format(a=n.x)", "{'a': n.x}", "(n.x, 1)"]
                + [f"n.x | {name}" for name in FILTERS]
            )
        ),
        ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "a text or list of more than 50"),
        ("{{ lipsum(n=100000000) }}", "lipsum"),
        ("{{ strftime_now('%c' * 10000000) }}", "a text or list of more than 50"),
    ],
)
def test_a_template_that_takes_too_much_time_or_memory_is_refused(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.1)
    started = time.process_time()
    with pytest.raises(OptionError, match=f"the chat template refuses these messages: .*({message})") as error:
        ChatTemplate({"default": source}, {}, Path()).render(HI)
    assert time.process_time() - started < 2
    assert len(str(error.value)) < 700


def test_probes_have_less_time_than_conversations() -> None:
    with pytest.raises(OptionError, match=r"it takes more than 0\.201 seconds"):
        ChatTemplate({"default": NESTED}, {}, Path()).thinking()


@pytest.mark.parametrize("length", [10, 10_000])
def test_limits_grow_with_the_conversation(length: int) -> None:
    """A template may append each message to texts and lists of its own: 500 times 5 MB here."""
    source = (
        "{% set n = namespace(text='', list=[]) %}{% for m in messages %}{% set n.text = n.text + m.content %}"
        "{% set n.list = n.list + [m] %}{% endfor %}{{ n.list | length }}{{ n.text }}"
    )
    messages = [{"role": "user", "content": "x" * length}] * 500
    assert ChatTemplate({"default": source}, {}, Path()).render(messages) == "500" + "x" * 500 * length


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% set a = namespace() %}{% set b = [a, a] %}{{ b }}", "it puts a namespace into a list"),
        ("{{ namespace(a=1) }}", "it prints a namespace"),
        ("{{ [[1], [2]] | sum(start=[]) }}", "it joins lists by the filter sum"),
        ("{{ ('a' * 200000) | urlencode }}", "it applies a slow filter"),
        ("{{ ('a' * 200000) | list | length }}", "it applies a slow filter"),
        ("{{ (5).to_bytes(3000000000, 'big') }}", "it pads or indents"),
        ("{{ ('\t' * 999999).expandtabs(9999) }}", "a text or list of more than"),
        ("{{ ('%(a)s' * 999) % {'a': 'b' * 99999} }}", "a text or list of more than"),
        ("{{ ('{0}' * 999).format('b' * 99999) }}", "a text or list of more than"),
        ("{{ ('a ' * 400000).split() | length }}", "a text or list of more than"),
        ("{{ ('a' * 99999).join(range(99) | map('string')) }}", "a text or list of more than"),
        ("{% set s = 'a' * 450000 %}" + "{% set x = s[1:] %}" * 80, "it makes too many texts"),
        ("{% set x %}{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}{% endset %}{{ x }}", "too many texts"),
    ],
)
def test_other_ways_to_much_memory(source: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"the chat template refuses these messages: .*{message}"):
        ChatTemplate({"default": source}, {}, Path()).render(HI)


def test_an_error_without_a_message_is_named_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(message: str) -> None:
        raise MemoryError

    monkeypatch.setattr(template_sandbox, "_raise_exception", exhausted)
    with pytest.raises(OptionError, match=r"refuses these messages: MemoryError$"):
        ChatTemplate({"default": "{{ raise_exception('') }}"}, {}, Path()).render(HI)


def test_long_error_messages_are_shortened() -> None:
    with pytest.raises(OptionError, match=r"refuses these messages: x{500}\.\.\.$"):
        ChatTemplate({"default": "{{ raise_exception('x' * 100000) }}"}, {}, Path()).render(HI)


def test_strings_of_ordinary_size_are_rendered() -> None:
    source = (
        "{{ 'a'.ljust(9) ~ '{:>5}|%'.format(1) ~ '%3d' % 7 ~ 'x' * 3 }}{{ 'a' | center(5) | replace('a', 'bb') }}"
        "{{ ['c', 'd'] | join('-') }}{{ 2 ** 10 }}{{ [1] + [2] }}"
        "{{ 'e\nf' | indent(2) }}{{ [1, 2] | batch(1) | list }}"
    )
    found = ChatTemplate({"default": source}, {}, Path()).render(HI)
    assert found == "a            1|%  7xxx  bb  c-d1024[1, 2]e\n  f[[1], [2]]"


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% generation %}", "{% nonsense %}", "{{ x | nofilter }}"])
def test_a_template_that_does_not_compile_is_named(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^model: the chat template cannot be compiled \(line 1\): "):
        ChatTemplate({"default": source}, {}, Path("model")).render(HI)


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% for i in [1] %}{% macro m() %}{% break %}{% endmacro %}{% endfor %}",
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
        "{% for i in [1] %}" * 120 + "{% endfor %}" * 120,
        "{% if " + "not " * 300 + "x %}{% endif %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% macro m(a, a) %}{% endmacro %}",
        "{{ f(a=1, a=2) }}",
        "{{ " + "9" * 5000 + " }}",
        "{{ x }}" * 200_000,
    ],
)
def test_what_python_cannot_compile_is_named_in_one_line(source: str) -> None:
    broken = ChatTemplate({"default": source}, {}, Path("model"))
    uses: list[Callable[[], object]] = [lambda: broken.render(HI), lambda: broken.render(HI, level=1), broken.thinking]
    for use in uses:
        with pytest.raises(CheckpointError, match=r"^model: the chat template cannot be compiled: .") as error:
            use()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 700
