"""Shared by the commands: --help, the options of generation, text from arguments and stdin."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from npqwen.commands.completion import completed
from npqwen.commands.flag_hints import hint, takes_text, unquoted, value_hint
from npqwen.errors import OptionError
from npqwen.generation.option import Option
from npqwen.generation.options import OPTIONS, GenerationOptions
from npqwen.terminal.terminal import Terminal
from npqwen.wording import quoted

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

STDIN_NOTICE_SECONDS = 1.0
"""Seconds without input on stdin after which a notice says that stdin is being read."""


class Command(click.Command):
    """A command whose --help, or -h, is written like all text, so that an error such as a full disk is one line.

    An unknown option, a value meant for another one, or text without quotes is rejected with a suggestion. Models and
    files have shell completion.
    """

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])
        for parameter in self.params:
            parameter.type = completed(parameter)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        text = takes_text(self)
        ctx.allow_extra_args = ctx.allow_extra_args or text is not None
        try:
            rest = super().parse_args(ctx, args)
            if rest and text is not None and not ctx.resilient_parsing:
                raise click.UsageError(unquoted(ctx, text, rest), ctx)
            return rest
        except click.NoSuchOption as error:
            instead = hint(ctx, error.option_name)
            problem = f"No such option '{error.option_name}'"
            raise click.UsageError(f"{problem}; {instead}" if instead else problem, ctx) from None
        except click.BadParameter as error:
            instead = value_hint(error)
            if not instead:
                raise
            raise click.BadParameter(f"{error.message.rstrip('.')}; {instead}", error.ctx, error.param) from None


class Switch(click.Option):
    """A pair of flags such as --think/--no-think, of which only one may be given."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        for opts, value in ((self.opts, True), (self.secondary_opts, False)):
            parser.add_option(obj=self, opts=opts, dest=self.name, action="append_const", const=value)

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        given = opts.get(self.name or "")
        if isinstance(given, list):
            if len(set(given)) > 1:
                both = f"{self.opts[0]} and {self.secondary_opts[0]}"
                raise click.UsageError(f"{both} exclude each other; give one of them", ctx)
            opts = {**opts, self.name or "": given[0]}
        return super().consume_value(ctx, opts)


def _show_help(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        Terminal().text(f"{ctx.get_help()}\n")
        ctx.exit()


class _Bias(click.ParamType):  # type: ignore[type-arg]
    """A token id and the bias to add to its logit."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        try:
            id, bias = str(value).split("=")
            return int(id), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not a token id and a bias, such as 151645=-5 or 13=-inf", param, ctx)


def generation_options(defaults: GenerationOptions) -> Callable[[Decorated], Decorated]:
    """Add a flag for every option of `npqwen.generation.options` that has one; the command gets them by keyword.

    An option that is not given is None. defaults: the command's own defaults, which the help then names.
    """

    def decorate(command: Decorated) -> Decorated:
        for option in reversed(OPTIONS.values()):
            if option.flag:
                command = _flag(option, defaults.get(option.name, option.default))(command)
        return command

    return decorate


def _flag(option: Option, default: Any) -> Callable[[Decorated], Decorated]:
    if option.kind is bool:
        help = option.help  # without a default, the help itself says what happens
        if default is not None:
            help = f"{option.help.rstrip('.')}; default: {'on' if default else 'off'}."
        return click.option(f"{option.flag_name}/--no-{option.flag_name[2:]}", cls=Switch, default=None, help=help)
    return click.option(
        option.name,
        *sorted((option.flag_name, *option.aliases), key=lambda flag: flag.startswith("--")),
        type=_Bias() if option.kind is None else option.kind,
        metavar=option.metavar,
        multiple=option.repeated,
        callback=_given if option.repeated else _parsed(option) if option.read is not None else None,
        help=f"{option.help.rstrip('.')}; {option.as_flag}." if option.as_flag else option.help,
    )


def _given(ctx: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """The values of a repeated flag: strings as a list, pairs as a dictionary; None without any."""
    if isinstance(parameter.type, _Bias):
        return dict(values) or None
    return [argument_text(value) for value in values] or None


def _parsed(option: Option) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """A callback that reads what a flag names, such as a file, before a model is loaded."""

    def parsed(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        return None if value is None or ctx.resilient_parsing else option.parse(argument_text(value))

    return parsed


class Counts(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas, each at least `low`."""

    name = "N,N"

    def __init__(self, low: int, example: str) -> None:
        self._low = low
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            counts = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as {self._example}", param, ctx)
        if min(counts) < self._low:
            self.fail(f"{min(counts)} is too small: it must be at least {self._low}", param, ctx)
        return counts


def check_numba() -> None:
    """Raise OptionError for environment variables with which Numba cannot compile or run the kernels."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise OptionError("NUMBA_DISABLE_JIT is set, but the kernels have to be compiled; unset it")
    threads = os.environ.get("NUMBA_NUM_THREADS", "")
    if threads and not (threads.isascii() and threads.isdecimal() and 1 <= int(threads[:9]) < 10**8):
        raise OptionError(f"NUMBA_NUM_THREADS is {quoted(threads)}, which Numba refuses; unset it")


def stdin_text(terminal: Terminal, waiting: str) -> str:
    """All of stdin decoded as UTF-8, with "\\n" as line ending and without the last one.

    waiting: the notice if no input arrives for STDIN_NOTICE_SECONDS, for users who do not know that stdin is read.
    Raises OptionError for invalid UTF-8.
    """
    notice = threading.Timer(STDIN_NOTICE_SECONDS, terminal.notice, (waiting,))
    notice.daemon = True
    notice.start()
    try:
        data = sys.stdin.buffer.read(1)
        notice.cancel()
        if data:  # at a keyboard, reading after end-of-file would wait for another one
            data += sys.stdin.buffer.read()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"the text on stdin is not UTF-8 (at byte {error.start})") from None
    finally:
        notice.cancel()
    return text.replace("\r\n", "\n").removesuffix("\n")


def keyboard_notice(what: str) -> str:
    """A notice that `what` is read from stdin, and how to end it at the keyboard."""
    end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
    return f"waiting for {what} on stdin; {end} on an empty line ends it"


def argument_text(text: str) -> str:
    """An argument decoded as UTF-8, whatever the locale. Raises OptionError if it is invalid."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise OptionError(f"{text!r} is not valid UTF-8") from None
