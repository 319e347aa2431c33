"""The `npqwen` command. Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.chat import chat
from npqwen.commands.options import argument_text, model_options, open_model, sampling_options, stdin_text
from npqwen.errors import NpqwenError
from npqwen.terminal.control_characters import without_control_characters

if TYPE_CHECKING:
    from npqwen.generation.stream import Stream

INTERRUPTED = 130
READER_GONE = 141


class _Commands(click.Group):
    """Ends a command that fails in one line, and one that is interrupted, or whose reader left, in none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NpqwenError as error:
            raise _Failure(str(error)) from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            from npqwen.terminal.console import discard_output

            discard_output()
            raise click.exceptions.Exit(READER_GONE) from None


class _Failure(click.ClickException):
    exit_code = 2


def main(args: list[str] | None = None) -> None:
    """Run the command line; exit status 2 and one line on stderr for every expected error."""
    _open_closed_streams()
    try:
        status = cli.main(args, prog_name="npqwen", standalone_mode=False)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"; see {error.ctx.command_path} --help"
        message = " ".join(error.format_message().split()).rstrip(".")
        click.echo(f"npqwen: error: {without_control_characters(message)}{hint}", err=True)
        status = 2
    except click.exceptions.Abort:
        status = INTERRUPTED
    sys.exit(status if isinstance(status, int) else 0)


def _open_closed_streams() -> None:
    """Whoever started this may have closed stdin, stdout or stderr (`<&-`): then nothing is read or written there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from npqwen import __version__

        click.echo(f"npqwen {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version)
def cli() -> None:
    """Qwen3 language models on ordinary CPUs.

    MODEL is a Hugging Face id such as Qwen/Qwen3-0.6B, a checkpoint directory, or a converted directory. The
    first two are converted once into a cache, then reused.
    """


cli.add_command(chat)


class _Counts(click.ParamType):  # type: ignore[type-arg]
    """Numbers of tokens, separated by commas."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 128,512", param, ctx)


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", type=int, metavar="N", help="At most N tokens; default: until the text ends.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--loop-guard", is_flag=True, help="End a text that repeats itself over and over.")
@sampling_options
@model_options
def generate(
    model: str,
    prompt: str,
    max_tokens: int | None,
    stop: tuple[str, ...],
    loop_guard: bool,
    bits: int | None,
    threads: int | None,
    context: int | None,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT: the text to stdout, statistics to stderr.

    PROMPT is raw text, without a chat template; - reads it from stdin, less one line break at its end.
    Sampling options that are not given are those the model's authors recommend (generation_config.json).
    """
    from npqwen.generation.generate import check_prompt, stream
    from npqwen.generation.options import check_options
    from npqwen.terminal.console import Console

    prompt = stdin_text() if prompt == "-" else argument_text(prompt)
    stops = [argument_text(text) for text in stop]
    options = {"max_tokens": max_tokens, "stop": stops, "loop_guard": loop_guard, **sampling}
    check_prompt(prompt)
    check_options(options)
    with Console(quiet=quiet) as console, closing(open_model(model, bits, threads, context, console)) as loaded:
        pieces = stream(loaded, prompt, progress=console.reading, **options)
        for piece in pieces:
            console.text(piece)
        console.end_line()
        console.notice(_statistics(pieces))


@cli.command()
@click.argument("source")
@click.argument("out", required=False)
@click.option("--bits", type=int, default=4, show_default=True, metavar="4|8|16", help="Bits a weight.")
@click.option("--force", is_flag=True, help="Replace a converted model that is there already.")
@click.option("--quiet", "-q", is_flag=True, help="No notices and no progress.")
def convert(source: str, out: str | None, bits: int, force: bool, quiet: bool) -> None:
    """Convert SOURCE, a checkpoint directory or Hugging Face id, into the directory OUT.

    Without OUT it goes into the cache, where the other commands look for it. Its place is printed.
    """
    from npqwen import hub
    from npqwen.terminal.console import Console

    with Console(quiet=quiet) as console:
        place = hub.convert(
            source,
            out,
            bits,
            force=force,
            notice=console.notice,
            progress=console.converting,
            download_bars=console.bars,
        )
        console.text(f"{place}\n")


def _statistics(stream: Stream) -> str:
    usage = stream.usage
    if stream.stop_string is not None:
        end = f"stopped at {stream.stop_string!r}"
    elif stream.finish_reason == "stop":
        end = "the text ended"
    elif stream.finish_reason == "loop":
        end = "the text repeated itself"
    else:
        end = "--max-tokens reached" if stream.max_tokens == usage.generated_tokens else "the context is full"
    return (
        f"prompt: {usage.prompt_tokens} tokens in {usage.prefill_seconds:.2f} s, "
        f"{usage.prefill_rate:.1f} tok/s; text: {usage.generated_tokens} tokens, "
        f"first after {usage.first_token_seconds:.2f} s, then {usage.decode_rate:.1f} tok/s; {end}"
    )


@cli.command()
@click.argument("model")
@click.option("--bits", type=int, metavar="4|8|16", help="Bits a weight, if not converted yet.")
@click.option(
    "--context", type=int, metavar="N", help="Count memory for N tokens; default: the model's limit."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(model: str, bits: int | None, context: int | None, as_json: bool) -> None:
    """What MODEL is: shapes, bits per weight, bytes by part, memory needed, and the kernels that will run.

    It is downloaded and converted first, as for the other commands, if it has not been.
    """
    from npqwen import hub
    from npqwen.reports.info import describe, inspect
    from npqwen.terminal.console import Console

    with Console() as console:
        path = hub.resolve(
            model, bits, notice=console.notice, progress=console.converting, download_bars=console.bars
        )
        found = inspect(path, context)
        console.text((json.dumps(found.as_dict(), indent=2) if as_json else describe(found)) + "\n")


@cli.command()
@click.argument("model")
@click.option("--prefill", type=_Counts(), default="512", show_default=True, help="Prompt lengths: 512,4096.")
@click.option("--decode", type=_Counts(), default="64", show_default=True, help="Tokens to generate.")
@click.option("--depth", type=_Counts(), default="0", show_default=True, help="Tokens in the cache before.")
@click.option("--repeat", type=int, default=5, show_default=True, help="Counted runs of each.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--report",
    is_flag=False,
    flag_value="npqwen-bench.md",
    metavar="[FILE]",
    help="Also write a report to share, with machine and versions, nothing private; JSON if FILE ends in .json. "
    "Default: npqwen-bench.md, with --report after MODEL.",
)
@model_options
def bench(
    model: str,
    prefill: list[int],
    decode: list[int],
    depth: list[int],
    repeat: int,
    as_json: bool,
    report: str | None,
    bits: int | None,
    threads: int | None,
    context: int | None,
    quiet: bool,
) -> None:
    """Tokens a second of MODEL here, and the share of the memory's read bandwidth that decoding reaches."""
    from npqwen.terminal.console import Console

    place = None
    if report is not None:
        from npqwen.reports.machine_report import check_path

        place = check_path(Path(report))
    with Console(quiet=quiet) as console, closing(open_model(model, bits, threads, context, console)) as loaded:
        from npqwen.reports.bench import benchmark
        from npqwen.reports.machine_report import collect, write

        speed = benchmark(loaded, prefill, decode, depth, repeat, progress=console.measuring)
        console.text((json.dumps(speed.as_dict(), indent=2) if as_json else speed.as_markdown()) + "\n")
        if place is not None:
            write(collect(loaded, speed), place)
            console.notice(f"the report is in {place}")
