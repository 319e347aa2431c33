"""Shared by the commands: --help, common options, opening a model, text from arguments and stdin."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from npqwen.errors import OptionError
from npqwen.format.recipe import CHOICES
from npqwen.generation.options import OPTIONS, GenerationOptions, Option
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path

    from npqwen.model import Model

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose --help, or -h, is written as all text is: with one line for an error, such as a full disk."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option


def _show_help(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        Terminal().text(f"{ctx.get_help()}\n")
        ctx.exit()


bits_option = click.option(
    "--bits", type=int, metavar="|".join(CHOICES), help="Bits per weight, if not converted yet."
)


quiet_option = click.option("--quiet", "-q", is_flag=True, help="No notices, progress bars or statistics.")
threads_option = click.option(
    "--threads", type=int, metavar="N", help="Number of threads; default: one per core."
)

yarn_option = click.option(
    "--yarn",
    type=float,
    metavar="FACTOR",
    help="Extend the context by YaRN, to 1 to 4 times the tokens trained on; short texts get a little worse.",
)


def model_options(command: Decorated) -> Decorated:
    """Add --bits, --threads, --context, --yarn and --quiet, for commands that load a model."""
    for option in (
        quiet_option,
        yarn_option,
        click.option("--context", type=int, metavar="N", help="Room for N tokens; default: the model's limit."),
        threads_option,
        bits_option,
    ):
        command = option(command)
    return command


class _Bias(click.ParamType):  # type: ignore[type-arg]
    """A token id and what to add to its logit."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        try:
            id, bias = str(value).split("=")
            return int(id), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not a token id and a bias, such as 151645=-5 or 13=-inf", param, ctx)


def generation_options(defaults: GenerationOptions) -> Callable[[Decorated], Decorated]:
    """Add a flag for every option of `npqwen.generation.options` that has one; the command gets them as keywords.

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
        help = f"{option.help.rstrip('.')}; default: {'on' if default else 'off'}."
        return click.option(f"{option.flag_name}/--no-{option.flag_name[2:]}", default=None, help=help)
    return click.option(
        option.flag_name,
        type=_Bias() if option.kind is None else option.kind,
        metavar=option.metavar,
        multiple=option.repeated,
        callback=_given if option.repeated else None,
        help=option.help,
    )


def _given(ctx: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """The values of a repeated flag: strings as a list, pairs as a dictionary; None without any."""
    if isinstance(parameter.type, _Bias):
        return dict(values) or None
    return [argument_text(value) for value in values] or None


def resolve(model: str, bits: int | None, terminal: Terminal) -> Path:
    """The converted directory of MODEL, downloaded and converted first if necessary, with notices and progress."""
    from npqwen import hub

    check_numba()
    return hub.resolve(
        model,
        bits,
        notice=terminal.notice,
        progress=terminal.conversion_progress,
        download_bars=terminal.shows_bars,
    )


def open_model(
    model: str,
    bits: int | None,
    threads: int | None,
    context: int | None,
    terminal: Terminal,
    yarn: float | None = None,
) -> Model:
    """Load MODEL, downloaded and converted first if necessary, with notices and progress on the terminal."""
    path = resolve(model, bits, terminal)

    from npqwen.hardware.machine import available_memory
    from npqwen.model import load

    loaded = load(path, threads=threads, context=context, yarn=yarn, on_compile=terminal.compilation_progress)
    available = available_memory()
    if available is not None and loaded.weight_bytes > available:
        from npqwen.reports.info import size

        terminal.notice(
            f"the weights are {size(loaded.weight_bytes)}, but only {size(available)} of memory are available: "
            "the rest will be read from disk again and again"
        )
    return loaded


def check_numba() -> None:
    """Raise OptionError for environment variables with which Numba cannot compile or run the kernels."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise OptionError("NUMBA_DISABLE_JIT is set, but the kernels have to be compiled; unset it")
    threads = os.environ.get("NUMBA_NUM_THREADS", "")
    if threads.lstrip("-").isdecimal() and int(threads) < 1:
        raise OptionError(f"NUMBA_NUM_THREADS is {threads}, which Numba refuses; unset it")


def stdin_text() -> str:
    """All of stdin as UTF-8, with "\\n" line ends and without the last of them."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt on stdin is not UTF-8 (at byte {error.start})") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def argument_text(text: str) -> str:
    """An argument decoded as UTF-8, whatever the locale."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise OptionError(f"{text!r} is not valid UTF-8") from None
