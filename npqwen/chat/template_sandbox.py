"""Jinja as Hugging Face transformers sets it up for chat templates, with limits of time and size.

A template is a program that comes with a model. Jinja's sandbox bars it from Python's internals, but not from running
for hours or exhausting memory. So everything that a template creates is measured (npqwen/chat/template_limits.py):
loops, macros, calls, filters and operators report to `LimitedEnvironment`, by calls that `_Guards` inserts where Jinja
has no hooks. The limits grow with the conversation, and are far above what chat templates need.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from npqwen.chat.template_limits import MAX_ITEMS, MAX_WIDTH, Limits

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Context

MAX_SOURCE = 100_000
"""Most characters of a template's source. Qwen3's have about 5,000; compiling takes about 10 µs per character."""

_WIDE = re.compile(r"\d{5}")
_PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill", "to_bytes"})
_PADDING_FILTERS = frozenset({"batch", "center", "indent", "slice"})
_SPLITTING = frozenset({"split", "rsplit", "splitlines"})
_SLOW_FILTERS = frozenset(
    {"filesizeformat", "int", "pprint", "striptags", "title", "truncate", "urlencode", "urlize", "wordcount"}
    | {"wordwrap", "xmlattr"}
)
_ITERATING_FILTERS = frozenset(
    {"batch", "groupby", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select"}
    | {"selectattr", "slice", "sort", "sum", "unique"}
)
"""Filters of lists, which treat a string as a list of its characters."""
_LIST_FILTERS = _ITERATING_FILTERS | {"attr", "count", "d", "default", "dictsort", "first", "items", "last", "length"}
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
        for name in self.filters:
            self.filters[name] = self._limited_filter(name, _to_json if name == "tojson" else self.filters[name])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now
        del self.globals["lipsum"]

    @property
    def limits(self) -> Limits:
        """The limits of the rendering that runs in this thread."""
        found: Limits = self._thread.limits
        return found

    def limited(self, template: jinja2.Template, variables: Mapping[str, Any], seconds: float) -> str:
        """The text that `template` renders. Raises whatever the template raises, SecurityError beyond a limit.

        seconds: CPU time, to which each message adds 1 ms.
        """
        before = getattr(self._thread, "limits", None)
        self._thread.limits = limits = Limits(variables, seconds)
        try:
            return "".join(_up_to(limits, template.generate(variables)))
        finally:
            self._thread.limits = before

    def tick(self, characters: int) -> str:
        """Called in every iteration of a loop and every call of a macro, with the length of the text in its body."""
        self.limits.charge(characters)
        return ""

    def sized(self, value: Any) -> Any:
        """`value`, which the template has just created; SecurityError if it is too large."""
        return self.limits.sized(value)

    def printed(self, value: Any) -> Any:
        """`value`, which is being converted to text; SecurityError if the text would be too large."""
        self.limits.check_printed(value)
        self.limits.charge(len(value) if isinstance(value, str) else 0)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`; SecurityError if the result would be too large."""
        limits = self.limits
        if operator == "%" and isinstance(left, str | bytes):
            limits.check_printed(right)
            self._check_format(left, right)
        elif operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                limits.check(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            limits.check_bits(bits)
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    limits.check(len(text) * times)
        return limits.sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method for a template; SecurityError if its result would be too large."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            name, arguments = method.__name__, [*args, *kwargs.values()]
            for value in arguments:
                __self.limits.check_printed(value)
            if name == "join" and args:
                parts = _items(args[0])
                __self._check_join(len(owner), parts)  # type: ignore[arg-type]
                args = parts, *args[1:]
            __self._check_method(owner, name, arguments)
        return __self.limits.sized(super().call(__context, __obj, *args, **kwargs))

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Guards().visit(source), name, filename, defer_init)

    def _check_format(self, text: str | bytes, values: Any) -> None:
        """Refuse formats with large widths, in the format itself or, by "*" and nested braces, in the values."""
        text = text if isinstance(text, str) else text.decode("latin-1")
        if _WIDE.search(text):
            raise SecurityError(f"it formats with a width of {MAX_WIDTH:,} or more")
        listed = [*values] if isinstance(values, list | tuple) else [values]
        listed += [*values.values()] if isinstance(values, Mapping) else []
        if "*" in text or re.search(r"{[^}]*{", text):
            self.limits.check_widths(listed)
        longest = max((len(value) for value in listed if isinstance(value, str)), default=0)
        self.limits.check(len(text) + (text.count("%") + text.count("{")) * longest)

    def _check_method(self, owner: Any, name: str, arguments: list[Any]) -> None:
        """Refuse calls of a method of a string or number whose result could be huge."""
        if name in _PADDING:
            self.limits.check_widths(arguments)
        elif name == "translate":
            raise SecurityError("translate is not available in chat templates")
        if not isinstance(owner, str):
            return
        if name == "expandtabs":
            width = next((value for value in arguments if isinstance(value, int)), 8)
            self.limits.check(len(owner) + owner.count("\t") * width)
        elif name in ("format", "format_map"):
            values = [value for item in arguments for value in (item.values() if isinstance(item, Mapping) else [item])]
            self._check_format(owner, values)
        elif name == "replace" and len(arguments) > 1:
            self._check_replace(owner, *arguments[:2])
        elif name in _SPLITTING:
            separator = arguments[0] if arguments else None
            pieces = owner.count(separator) if isinstance(separator, str) and separator else len(owner) // 2
            self.limits.check(len(owner) + 64 * pieces)

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.limits.check(len(text) + text.count(old) * len(new))

    def _check_join(self, separator: int, parts: Any) -> None:
        """SecurityError if the joined text would be too large. separator: its length in characters."""
        if isinstance(parts, list | tuple):
            self.limits.check(sum(separator + len(part) for part in parts if isinstance(part, str)))

    def _limited_filter(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """One of Jinja's filters, with its arguments and result checked. Some take the context or environment first."""
        passed = getattr(original, "jinja_pass_arg", None)
        at = 0 if passed is None else 1

        def limited(*args: Any, **kwargs: Any) -> Any:
            value, arguments = args[at], [*args[at + 1 :], *kwargs.values()]
            limits = self.limits
            if name not in _LIST_FILTERS:
                limits.check_printed(value)
            if name in _SLOW_FILTERS or (name in _ITERATING_FILTERS and isinstance(value, str)):
                limits.check_items(value)
            if name == "format":
                self._check_format(str(value), arguments)
            elif name == "replace" and len(arguments) > 1:
                self._check_replace(str(value), *arguments[:2])
            elif name == "join":
                value = _items(value)
                self._check_join(len(str(arguments[0])) if arguments else 0, value)
            elif name in _PADDING_FILTERS:
                limits.check_widths(arguments)
                if name == "indent":
                    width = next((n for n in arguments if isinstance(n, int)), 4)
                    limits.check(len(str(value)) + (str(value).count("\n") + 1) * width)
            elif name == "sum" and any(isinstance(argument, list | tuple) for argument in arguments):
                raise SecurityError("it joins lists by the filter sum")
            elif name == "tojson":
                limits.check(_json_size(limits, value, *args[at + 1 :], **kwargs))
            return limits.sized(original(*args[:at], value, *args[at + 1 :], **kwargs))

        if passed is not None:
            limited.jinja_pass_arg = passed  # type: ignore[attr-defined]
        return limited

    def _strftime_now(self, format: str) -> str:
        self.limits.check(len(format) * 2000)
        return datetime.now().strftime(format)


class _Guards(NodeTransformer):
    """Inserts calls of `tick` into loops and macros, of `printed` and `sized` around new texts and lists."""

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

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._sized(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._sized(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._sized(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._sized(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def _sized(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("sized", node.lineno, node)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        characters = sum(len(data.data) for part in node.body for data in _text_within(part))
        self.generic_visit(node)
        tick = _call("tick", node.lineno, nodes.Const(characters, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _text_within(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """The constant texts within a node."""
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


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
    environment = context.environment
    return environment.printed(value) if isinstance(environment, LimitedEnvironment) else value


def _up_to(limits: Limits, parts: Iterator[str]) -> Iterator[str]:
    total = 0
    for part in parts:
        total += len(part)
        limits.check(total)
        yield part


def _items(value: Any) -> Any:
    """`value`, or a list of an iterator's items, so that they can be counted."""
    if not isinstance(value, Iterator):
        return value
    found = list(islice(value, MAX_ITEMS + 1))
    if len(found) > MAX_ITEMS:
        raise SecurityError(f"it joins more than {MAX_ITEMS:,} items")
    return found


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _json_size(
    limits: Limits, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, *rest: Any,
    **others: Any,
) -> int:  # fmt: skip
    """Upper bound of the length of `_to_json`'s text. Escapes have up to 6 characters; items are indented by depth."""
    limits.check_widths([indent])
    size, depth = limits.size(value), limits.depth(value)
    width = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    between = sum(len(part) for part in separators if isinstance(part, str)) if isinstance(separators, tuple) else 0
    escaped = 6 * size if ensure_ascii else size
    return escaped + size // 64 * (max(0, width) * (depth + 1) + between)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
