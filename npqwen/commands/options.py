"""What commands that run a model share: their options, opening the model, and text from outside."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from npqwen.errors import OptionError

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.terminal.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """--bits, --threads, --context and --quiet, for commands that load a model."""
    for option in (
        click.option("--quiet", "-q", is_flag=True, help="No notices, progress or statistics."),
        click.option("--context", type=int, metavar="N", help="Room for N tokens; default: the model's."),
        click.option("--threads", type=int, metavar="N", help="Threads that compute; default: one a core."),
        click.option("--bits", type=int, metavar="4|8|16", help="Bits a weight, if not converted yet."),
    ):
        command = option(command)
    return command


class _Bias(click.ParamType):  # type: ignore[type-arg]
    """A token's id and what its logit is to get."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        try:
            id, bias = str(value).split("=")
            return int(id), float(bias)
        except ValueError:
            self.fail(f"{value!r} is no token id and bias such as 151645=-5 or 13=-inf", param, ctx)


def _biases(
    ctx: click.Context, param: click.Parameter, values: tuple[tuple[int, float], ...]
) -> dict[int, float] | None:
    return dict(values) or None


def sampling_options(command: Command) -> Command:
    """The options of `npqwen.generation.sampler.Sampling`; those left out are the model's own."""
    for option in (
        click.option("--seed", type=int, help="The same seed gives the same text again."),
        click.option(
            "--logit-bias",
            type=_Bias(),
            multiple=True,
            callback=_biases,
            help="Added to the logit of a token; -inf forbids it; may be repeated.",
        ),
        click.option("--frequency-penalty", type=float, help="Subtracted each time for a token generated again."),
        click.option("--presence-penalty", type=float, help="Subtracted for tokens generated so far."),
        click.option("--repetition-penalty", type=float, help="Divides for tokens in prompt and text."),
        click.option("--min-p", type=float, help="Only tokens so many times as likely as the best."),
        click.option("--top-p", type=float, help="Only the likeliest tokens that sum to this."),
        click.option("--top-k", type=int, help="Only the k likeliest tokens; 0: all."),
        click.option("--temperature", type=float, help="0: always the likeliest token."),
    ):
        command = option(command)
    return command


def open_model(
    model: str, bits: int | None, threads: int | None, context: int | None, console: Console
) -> Model:
    """The model, converted if need be, with what is going on told on the console."""
    from npqwen import hub

    path = hub.resolve(
        model, bits, notice=console.notice, progress=console.converting, download_bars=console.bars
    )

    from npqwen.hardware.machine import available_memory
    from npqwen.model import load

    loaded = load(path, threads=threads, context=context, on_compile=console.compiling)
    available = available_memory()
    if available is not None and loaded.weight_bytes > available:
        from npqwen.reports.info import size

        console.notice(
            f"the weights are {size(loaded.weight_bytes)} and {size(available)} of memory are available: "
            "the rest is read from disk again and again"
        )
    return loaded


def stdin_text() -> str:
    """All of stdin, which is UTF-8, less one line break at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt on stdin is not UTF-8 (at byte {error.start})") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def argument_text(text: str) -> str:
    """An argument as the UTF-8 it was typed in, whatever the locale made of it."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise OptionError(f"{text!r} is not valid UTF-8") from None
