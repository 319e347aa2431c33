"""Chat templates: programs that come with a model, here with endless loops, huge results and escapes."""

from __future__ import annotations

import json
import os
from random import Random

from hostile.case import Case, Place, change_json, damage, write

_NAMES = ("a", "b", "c", "d", "e")
_DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(TIMES) %}{% set n.x = OP %}{% endfor %}{{ USE }}"
_STEPS = (
    "n.x + n.x", "n.x ~ n.x", "n.x * 2", "n.x * n.x | length", "[n.x, n.x]", "{'a': n.x, 'b': n.x}", "(n.x, n.x)",
    "n.x.replace('a', n.x)", "n.x | replace('b', 'abab')", "n.x.join([n.x, n.x, n.x])", "[n.x, n.x] | join(n.x)",
    "'%s%s' % (n.x, n.x)", "'{}{}'.format(n.x, n.x)", "n.x | tojson", "n.x | urlencode", "n.x | e | e", "n.x | string",
    "n.x | pprint", "n.x | list", "n.x | upper", "n.x | batch(2) | list", "n.x | slice(2) | list", "n.x | indent(9)",
    "n.x.encode() ", "n.x | center(9999)", "n.x.ljust(9999)", "n.x.splitlines()", "n.x.split('a')", "n.x | wordwrap(1)",
    "n.x | forceescape", "n.x | xmlattr", "n.x ** 2", "n.x << 2", "dict(a=n.x, b=n.x)", "n.x | map('string') | list",
    "n.x | groupby(0)", "n.x | sort", "n.x | unique | list", "n.x | sum(start=n.x)", "n.x | reverse | list",
    "cycler(n.x, n.x)", "joiner(n.x)", "namespace(a=n.x)", "n", "n.x | format(n.x)", "n.x | truncate(9**9)",
    "n.x | filesizeformat", "n.x | striptags", "n.x | urlize", "n.x.partition('a')", "n.x | tojson(indent=9999)",
)  # fmt: skip
_STARTS = ("'ab'", "'a'", "['ab']", "[1]", "3", "{}", "messages", "'\\t'", "'<a>'", "1.5", "tools", "'a b\\nc'")
_USES = (
    "n.x", "n.x | tojson", "n.x | string", "n.x | length", "n", "n.x | pprint", "'%r' % n.x", "n.x ~ n.x", "n.x == n.x",
    "n.x < n.x", "n.x in n.x", "n.x | sort", "n.x | max", "n.x | hash", "n.x | sum", "n.x | list | tojson",
)  # fmt: skip
_WHOLE = (
    "{{ 7 ** (10 ** 8) }}", "{{ 'a' * 3000000000 }}", "{{ 3000000000 * [1] }}", "{{ '{:>2000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 2000000000) }}", "{{ '{:.2000000000f}'.format(1.5) }}", "{{ '%2000000000d' % 1 }}",
    "{{ '%*d' % (2000000000, 1) }}", "{{ '%.*f' % (99999999, 1.5) }}", "{{ 'a'.ljust(3000000000) }}",
    "{{ 'a' | center(3000000000) }}", "{{ {'a': [1]} | tojson(indent=100000000) }}",
    "{{ [1] | slice(50000000) | list }}", "{{ lipsum(n=100000000) }}", "{{ strftime_now('%c' * 10000000) }}",
    "{{ strftime_now('%') }}", "{{ strftime_now('\\0') }}", "{{ strftime_now(5) }}", "{{ range(10 ** 18) | list }}",
    "{{ range(99999) | sum }}", "{{ range(99999) | list | tojson }}", "{{ (range(99999) | list) * 99 | length }}",
    "{{ 1 / 0 }}", "{{ 1 // 0.0 }}", "{{ raise_exception('x' * 1000000) }}",
    "{{ raise_exception('\\x1b[31m\\n\\0') }}", "{{ raise_exception(5) }}", "{{ raise_exception() }}",
    "{{ messages.x.y }}", "{{ ''.__class__.__mro__ }}", "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}", "{{ messages | attr('__class__') }}",
    "{{ ''.format.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}", "{{ '{0.__init__}'.format_map(n) }}",
    "{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}", "{{ self }}", "{{ loop }}",
    "{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for a in range(99999) recursive %}{{ loop(range(9)) }}{% endfor %}", "{% set x %}{{ x }}{% endset %}{{ x }}",
    "{% for a in messages %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% break %}", "{% continue %}", "{% macro m(a, a) %}{% endmacro %}", "{{ f(k=1, k=2) }}", "{{ ", "9", " }}",
    "{% call(a) x() %}{% break %}{% endcall %}", "{% block a %}{% break %}{% endblock %}", "{% generation %}",
    "{% set a.b.c = 1 %}", "{% set messages = 5 %}{{ messages[0] }}", "{% filter upper %}{% endfilter",
    "{{ '\\ud800' }}", "{{ 'a'|center(3e9) }}", "{{ 1e400 | int }}", "{{ '1' * 9999 | int }}",
    "{{ ('1' * 9999) | int }}", "{{ ('9' * 4000000) | int }}", "{{ (1e308 * 10) | round }}",
    "{{ 5 | round(99999999) }}", "{{ -5 ** 0.5 }}", "{{ messages[::0] }}", "{{ messages[10**30] }}", "{{ 'a' < 1 }}",
    "{{ {[]: 1} }}", "{{ messages | join(5) }}", "{{ messages.append(1) }}", "{{ messages.clear() }}",
    "{{ messages[0].update(a=1) }}", "{{ messages[0].pop('role') }}", "{{ tools | tojson }}", "{{ documents[0] }}",
    "{{ namespace | tojson }}", "{{ range | tojson }}", "{{ undefined.x }}",
    "{{ ('a' * 9999999) is in ('b' * 9999999) }}", "{{ ('ab' * 9999999).count('ba') }}",
    "{{ ('a' * 9999999).find('b') }}", "{{ ('a' * 9999999 ~ 'b') | urlize }}", "{{ ('<' * 1999999) | striptags }}",
    "{{ ('a ' * 999999) | wordwrap(1) }}", "{{ ('http://a.b/' * 99999) | urlize }}", "{{ ('a' * 19999999) | title }}",
    "{{ ('&' * 19999999) | e }}", "{{ ('a' * 19999999) | urlencode }}", "{{ ('é' * 19999999) | urlencode }}",
    "{{ ('é' * 9999999) | tojson }}", "{{ ('a' * 19999999) | list | length }}", "{{ ('a' * 19999999) | reverse }}",
    "{{ ('a,' * 9999999).split(',') | length }}", "{{ ('a' * 19999999) | batch(1) | list | length }}",
    "{{ ('a' * 1999999) | sort | length }}", "{{ ('a' * 9999999) | map('upper') | join | length }}",
    "{{ ('ab' * 999999) | groupby(0) | list | length }}", "{% for c in 'a' * 19999999 %}{% endfor %}",
    "{% for c in 'a' * 19999999 if c == 'b' %}{% endfor %}", "{% for a, b in [(1, 2, 3)] %}{% endfor %}",
    "{% for a in 5 %}{% endfor %}", "{% for a in range %}{% endfor %}",
)  # fmt: skip
_NESTED = (
    ("{% for a in messages %}", "{% endfor %}"), ("{% if a %}", "{% endif %}"), ("{% macro m(x) %}", "{% endmacro %}"),
    ("{{ (", ") }}"), ("{{ [", "] }}"), ("{{ not ", "a }}"), ("{{ -", "1 }}"), ("{{ a ~ ", "a }}"),
    ("{% call a() %}", "{% endcall %}"), ("{% filter upper %}", "{% endfilter %}"), ("{# ", " #}"),
)  # fmt: skip
_REPEATED = (
    "text", "{% if a %}{% endif %}", "{{ a }}", "{# x #}", "{% set a = 1 %}", "{", "{%", "{{ 'x' }}", "\n", "{{ a.b }}",
    "{% for a in b %}{% endfor %}", "é", "{{ a | upper }}", "{% macro m() %}{% endmacro %}", "{% elif a %}",
)  # fmt: skip
_FRAMES = (
    "{% for a in messages %}BODY{% endfor %}", "{% if messages %}BODY{% endif %}",
    "{% if enable_thinking %}BODY{% endif %}", "{% macro m(x) %}BODY{% endmacro %}{{ m(1) }}{{ m(2) }}",
    "{% set y %}BODY{% endset %}{{ y }}", "{% raw %}BODY{% endraw %}", "{% for a in range(99999) %}BODY{% endfor %}",
    "{% for a in range(99) %}{% for b in range(99) %}BODY{% endfor %}{% endfor %}",
    "{% filter upper %}BODY{% endfilter %}", "{% call x() %}BODY{% endcall %}", "{% block z %}BODY{% endblock %}",
    "{% generation %}BODY{% endgeneration %}", "{% with q = 1 %}BODY{% endwith %}",
    "{% autoescape true %}BODY{% endautoescape %}", "{% if tools %}BODY{% else %}BODY{% endif %}", "BODYBODYBODYBODY",
    "{{ messages[0].content }}BODY",
)  # fmt: skip


def templates(random: Random, place: Place) -> Case:
    """A template in tokenizer_config.json, chat_template.jinja or additional_chat_templates, and one question."""
    model = place.copy(random.choice(["dense-4", "mixture-4"]))
    kind, source = _source(random)
    for _ in range(random.choice([0, 0, 1, 2, 3])):
        frame = random.choice(_FRAMES)
        if len(source) * frame.count("BODY") < 2_000_000:
            source = frame.replace("BODY", source)
    where = random.choice(["config", "config", "file", "named", "more", "link"])
    if where == "config":
        change_json(model / "tokenizer_config.json", lambda config: config.update(chat_template=source))
    elif where == "named":
        named = [{"name": "default", "template": source}, {"name": "tool_use", "template": "{{ 1 }}"}]
        change_json(model / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    elif where == "link":
        os.symlink(random.choice(["/dev/zero", "/etc/passwd", ".", "missing"]), model / "chat_template.jinja")
    else:
        path = model / "chat_template.jinja"
        if where == "more":
            (model / "additional_chat_templates").mkdir()
            name = random.choice(["a", "tool_use", "x" * 200])
            path = model / "additional_chat_templates" / f"{name}.jinja"
        write(path, source)
    options = random.choice([[], ["--think"], ["--no-think"], ["--system", "Be brief."]])
    args = ["chat", str(model), "What is this?", "-n", "1", "-t", "1", "--quiet", *options]
    return Case(f"{where}: {kind}: {source[:120]}", args)


def _source(random: Random) -> tuple[str, str]:
    """A template and what kind it is."""
    kind = random.random()
    if kind < 0.35:
        source = _DOUBLED.replace("START", random.choice(_STARTS)).replace("OP", random.choice(_STEPS))
        source = source.replace("TIMES", random.choice(["30", "60", "999"]))
        return "growing", source.replace("USE", random.choice(_USES))
    if kind < 0.7:
        return "whole", random.choice(_WHOLE)
    if kind < 0.8:
        count = random.choice([20, 25, 100, 120, 300, 3000])
        opened, closed = random.choice(_NESTED)
        if opened.startswith("{{ "):
            inner, end = opened[3:], closed[:-3]
            end = end if end in (")", "]") else ""
            return "nested", "{{ " + inner * count + "a" + end * count + " }}"
        return "nested", opened * count + closed * count
    if kind < 0.9:
        size = random.choice([10_000, 100_000, 1_000_000, 10_000_000])
        piece = random.choice(_REPEATED)
        return f"{size:,} characters", piece * (size // len(piece))
    how, content = damage(json.dumps(random.choice(_WHOLE)).encode() + b"{{ messages[0].content }}", random)
    return how, content.decode("utf-8", "replace")
