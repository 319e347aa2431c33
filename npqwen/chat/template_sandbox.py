"""Jinja as Hugging Face transformers sets it up for chat templates, with limits of time and size.

A template is a program that comes with a model. Jinja's sandbox bars it from Python's internals, but not from running
for hours or filling the memory. The limits here are far beyond what conversations need.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Context

MAX_SOURCE = 1_000_000
"""Characters of a template's source. Qwen3's have about 5,000."""
MAX_SIZE = 20_000_000
"""Characters of the rendered text and of intermediate strings; items of lists."""
MAX_WIDTH = 10_000
"""Characters of padding or indentation; bits of an integer."""
MAX_SECONDS = 10.0
"""CPU time of one rendering."""

_ITEM = 64
"""Characters that each item of a list or object counts as, in addition to its text."""
_WIDE = re.compile(r"\d{5}")
_PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_PADDING_FILTERS = frozenset({"batch", "center", "indent", "slice"})
_LIST_FILTERS = {
    "attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "random", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "sort", "sum", "tojson",
    "unique",
}  # fmt: skip
"""Filters that do not print lists and objects."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; `limited` renders it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # The optimizer would evaluate constant expressions at compile time, without limits.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_printed,
            extensions=[_GenerationBlock, loopcontrols],
        )
        self._thread = threading.local()
        for name in self.filters.keys() - _LIST_FILTERS:
            self.filters[name] = _limited_filter(name, self.filters[name])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def limited(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text that `template` renders. Raises whatever the template raises, SecurityError beyond a limit."""
        before = getattr(self._thread, "deadline", None)
        self._thread.deadline = time.thread_time() + MAX_SECONDS
        try:
            return "".join(_up_to(MAX_SIZE, template.generate(variables)))
        finally:
            self._thread.deadline = before

    def tick(self) -> str:
        """Called in every iteration of a loop and every call of a macro; raises SecurityError after the deadline."""
        deadline = getattr(self._thread, "deadline", None)
        if deadline is not None and time.thread_time() > deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")
        return ""

    def sized(self, value: Any) -> Any:
        """`value`; SecurityError if it is a string or list that is too large."""
        if isinstance(value, (str, list, tuple)):
            _check_size(len(value))
        return value

    def printed(self, value: Any) -> Any:
        """`value`; SecurityError if it is a list or object whose text would be too large."""
        _check_printed(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`; SecurityError if the result would be too large."""
        if operator == "+":
            return self.sized(left + right)
        if operator == "%" and isinstance(left, str):
            _check_printed(right)
            _check_format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            _check_bits(bits)
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    _check_size(len(text) * times)
        return self.sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method for a template; SecurityError if its result would be too large."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _check_printed(*args, *kwargs.values())
            _check_method(text, method.__name__, [*args, *kwargs.values()])
        return __self.sized(super().call(__context, __obj, *args, **kwargs))

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Guards().visit(source), name, filename, defer_init)


class _Guards(NodeTransformer):
    """Inserts calls of `tick` into loops and macros, and of `sized` around concatenations."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_call("printed", part.lineno, part) for part in node.nodes]
        return _call("sized", node.lineno, node)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", node.lineno), lineno=node.lineno))
        return node


def _call(name: str, line: int, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None, lineno=line)


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's text for training; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@jinja2.pass_context
def _printed(context: Context, value: Any) -> Any:
    """A value that is about to be printed. (With the context as an argument, it is not called at compile time.)"""
    _check_printed(value)
    return value


def _up_to(size: int, parts: Iterator[str]) -> Iterator[str]:
    for part in parts:
        size -= len(part)
        _check_size(MAX_SIZE - size)
        yield part


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes a text or list of more than {MAX_SIZE:,} characters or items")


def _check_bits(bits: int) -> None:
    if bits > MAX_WIDTH:
        raise SecurityError(f"it makes a number of more than {MAX_WIDTH:,} bits")


def _check_widths(values: list[Any]) -> None:
    if any(isinstance(value, int) and value > MAX_WIDTH for value in values):
        raise SecurityError(f"it pads or indents by more than {MAX_WIDTH:,} characters")


def _check_format(text: str, values: Any) -> None:
    """Refuse formats with large widths, in the format itself or, by "*" and nested braces, in the values."""
    if _WIDE.search(text):
        raise SecurityError(f"it formats with a width of {MAX_WIDTH:,} or more")
    if "*" in text or re.search(r"{[^}]*{", text):
        _check_widths([*(values if isinstance(values, list | tuple) else [values])])


def _check_method(text: str, name: str, arguments: list[Any]) -> None:
    """Refuse calls of a string's methods whose result could be huge."""
    if name in _PADDING:
        _check_widths(arguments)
    elif name in ("format", "format_map"):
        values = [value for item in arguments for value in (item.values() if isinstance(item, Mapping) else [item])]
        _check_format(text, values)
    elif name == "replace" and len(arguments) > 1:
        _check_replace(text, *arguments[:2])
    elif name == "join" and isinstance(arguments[0], list | tuple):
        _check_join(text, arguments[0])
    elif name == "translate":
        raise SecurityError("translate is not available in chat templates")


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_size(len(text) + text.count(old) * len(new))


def _check_join(separator: str, parts: list[Any] | tuple[Any, ...]) -> None:
    _check_size(sum(len(separator) + len(part) for part in parts if isinstance(part, str)))


def _limited_filter(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters, with its arguments checked. Some take the context or the environment first."""
    passed = getattr(original, "jinja_pass_arg", None)

    def limited(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args if passed is None else args[1:]
        _check_printed(value)
        arguments = [*rest, *kwargs.values()]
        if name == "format":
            _check_format(str(value), arguments)
        elif name == "replace" and len(arguments) > 1:
            _check_replace(str(value), *arguments[:2])
        elif name == "join" and isinstance(value, list | tuple):
            _check_join(str(arguments[0]) if arguments else "", value)
        elif name in _PADDING_FILTERS:
            _check_widths(arguments)
        return original(*args, **kwargs)

    if passed is not None:
        limited.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return limited


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    _check_widths([indent])
    _check_printed(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_printed(*values: Any) -> None:
    """Refuse lists and objects whose text would be too large: they may contain one list any number of times."""
    for value in values:
        if isinstance(value, (list, tuple, dict)):
            _check_size(_text_size(value, {}))


def _text_size(value: Any, known: dict[int, int]) -> int:
    """Approximate characters of a value's text. known: the sizes of lists and objects that were met before, by id."""
    if isinstance(value, str):
        return _ITEM + len(value)
    if not isinstance(value, (list, tuple, dict)):
        return _ITEM
    size = known.get(id(value))
    if size is None:
        parts = [part for item in value.items() for part in item] if isinstance(value, dict) else value
        size = known[id(value)] = _ITEM + sum(_text_size(part, known) for part in parts)
    return size


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    _check_size(len(format) * 2000)
    return datetime.now().strftime(format)
