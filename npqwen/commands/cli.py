"""The command line `npqwen`. A command is imported when it is used, and imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from npqwen.checks import near_names
from npqwen.commands.options import Command, check_numba
from npqwen.errors import NpqwenError
from npqwen.terminal.terminal import Terminal, discard, one_line
from npqwen.wording import alternatives

FAILED = 2
INTERRUPTED = 130
READER_GONE = 141
COMMANDS = (
    "batch", "bench", "cache", "chat", "completions", "convert", "doctor", "embed", "eval", "generate", "help", "info",
    "list", "pull", "rerank", "rm", "serve", "verify",
)  # fmt: skip
"""The commands; each is a function in the module of the same name."""
_ELSEWHERE = {
    "run": "chat", "show": "info", "complete": "generate", "quantize": "convert", "perplexity": "eval",
    "ls": "list", "models": "list", "ps": "list", "download": "pull", "remove": "rm", "delete": "rm", "prune": "cache",
    "server": "serve", "start": "serve", "check": "verify", "fsck": "verify", "embedding": "embed",
    "embeddings": "embed", "encode": "embed", "rank": "rerank", "score": "rerank", "diagnose": "doctor",
    "env": "doctor", "man": "help", "docs": "help", "topics": "help", "completion": "completions",
    "version": "--version",
}
"""Commands of other programs -> the one here."""


class _Group(Command, click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"npqwen.commands.{name}"), name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:  # set during shell completion
            return super().resolve_command(ctx, args)
        near = near_names(name, (*COMMANDS, "--version"), _ELSEWHERE)
        hint = f"; did you mean {alternatives(near)}?" if near else ""
        raise click.UsageError(f"No such command '{name}'{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A row for each command: its first sentence, wrapped. click itself truncates it to one line."""
        commands = {name: self.get_command(ctx, name) for name in COMMANDS}
        rows = [(name, _first_sentence(command.help or "")) for name, command in commands.items() if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            check_numba()  # before a command imports it
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def _show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from npqwen import __version__

        Terminal().text(f"npqwen {__version__}\n")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def cli() -> None:
    """Run Qwen3 language models on ordinary CPUs.

    MODEL is a Hugging Face id such as Qwen/Qwen3-0.6B, a checkpoint directory, a GGUF file (model.gguf, or on the hub
    owner/name:Q4_K_M), or a converted directory. All but the last are converted once and kept in a cache.

    npqwen help TOPIC shows the documentation, npqwen COMMAND --help the options of a command.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit. Every expected error is one line on stderr and exit status 2."""
    _open_closed_streams()
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    """The exit status."""
    try:
        status = cli.main(args, prog_name="npqwen", standalone_mode=False)
    except click.ClickException as error:
        message = one_line(error.format_message()).rstrip(".")
        if isinstance(error, click.UsageError) and error.ctx is not None:
            see = " See" if message.endswith("?") else "; see"
            message = one_line(f"{message}{see} {error.ctx.command_path} --help")
        return _fail(message)
    except NpqwenError as error:
        return _fail(one_line(str(error)))
    except MemoryError as error:
        cause = f" ({one_line(str(error))})" if str(error) else ""
        return _fail(f"out of memory{cause}; use a smaller --context or fewer --bits")
    except BrokenPipeError:
        discard(sys.stdout)
        return READER_GONE
    except FileNotFoundError:
        if _has_current_directory():
            raise
        return _fail("the current directory does not exist any more; change to another one")
    except click.exceptions.Abort:
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _has_current_directory() -> bool:
    """False if it was removed: then relative paths cannot be made absolute."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _fail(message: str) -> int:
    try:
        sys.stderr.write(f"npqwen: error: {message}\n")
        sys.stderr.flush()
    except OSError:  # only the exit status is left to report it
        discard(sys.stderr)
    return FAILED


def _open_closed_streams() -> None:
    """Open the null device for standard streams that are closed (as by `<&-`), which Python sets to None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
