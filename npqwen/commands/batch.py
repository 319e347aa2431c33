"""The command `npqwen batch`."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from npqwen.atomic_file import writing
from npqwen.commands.loading import (
    Loading,
    adapter_option,
    check_server,
    draft_option,
    model_options,
    offers,
    prefix_cache_options,
)
from npqwen.commands.options import Command, argument_text, keyboard_notice, stdin_text
from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.server.batch_file import Answers, BatchInput

SOME_FAILED = 1
STANDARD = "-"
"""As INPUT stdin, as OUTPUT stdout."""


@click.command(cls=Command)
@click.argument("requests", metavar="INPUT")
@click.argument("answers", metavar="OUTPUT")
@click.option("--model", metavar="MODEL", help="Answer with MODEL, whatever model the requests name.")
@click.option("--any-order", is_flag=True, help="Write each answer as soon as it is complete.")
@click.option("--parallel", type=int, metavar="N", help="Compute at most N answers at once; default: 16.")
@draft_option
@adapter_option
@prefix_cache_options
@model_options
def batch(
    requests: str,
    answers: str,
    model: str | None,
    any_order: bool,
    parallel: int | None,
    loading: Loading,
    quiet: bool,
) -> None:
    """Answer the requests of INPUT, a file in OpenAI's batch format, and write the answers to OUTPUT.

    INPUT has one JSON object a line: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body":
    {"model": ..., "messages": [...]}}. Run again, after an interruption or errors, the command answers what OUTPUT
    lacks, and tries again what failed. INPUT may be a pipe, or - for stdin, OUTPUT - for stdout. Exit status 1: the
    answers of some requests are errors.
    """
    check_server()
    from npqwen.hub.names import model_name
    from npqwen.server import batch_run
    from npqwen.server.models import Models
    from npqwen.server.settings import Settings

    settings = Settings() if parallel is None else Settings(parallel=parallel)
    with Terminal(quiet=quiet) as terminal, _read(requests, terminal) as given:
        names = sorted(given.models) if model is None else [argument_text(model)]
        if "" in names:
            raise OptionError(f"{given.name} has requests that name no model; name it with --model")
        if loading.adapters and model is None:
            raise OptionError("--adapter needs --model MODEL, the model that it belongs to")
        with _written(answers, given, terminal) as output:
            if output.answered:
                terminal.notice(f"{len(output.answered)} of {len(given.custom_ids)} are answered already")
            called = names if model is None else [model_name(names[0])]
            served = Models(*offers(names, called, loading, terminal), settings=settings)
            answering = None if model is None else called[0]
            if loading.first_adapter is not None:
                answering = f"{answering}:{loading.first_adapter}"
            start = time.perf_counter()
            counts = batch_run.run(
                served,
                settings,
                given,
                output,
                model=answering,
                ordered=not any_order,
                progress=terminal.progress("answering", " requests"),
            )
            seconds = time.perf_counter() - start
            failed = f", {counts.failed} of them with an error" if counts.failed else ""
            rate = f"; {counts.tokens / seconds:.1f} generated tokens/s" if counts.tokens else ""
            terminal.notice(f"{counts.answered} answered in {seconds:.1f} s{failed}{rate}")
    if counts.failed:
        raise click.exceptions.Exit(SOME_FAILED)


@contextlib.contextmanager
def _read(requests: str, terminal: Terminal) -> Iterator[BatchInput]:
    """INPUT. Requests from stdin or a pipe are kept in a temporary file: each is read again when it is answered."""
    from npqwen.server.batch_file import BatchInput

    path = Path(requests)
    with contextlib.ExitStack() as closing:
        if requests == STANDARD:
            piped: BinaryIO | None = io.BytesIO(stdin_text(terminal, keyboard_notice("the requests")).encode())
        else:
            piped = _pipe(path)
        if piped is not None:
            path = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="npqwen-")), "requests.jsonl")
            with piped, writing(path), open(path, "wb") as kept:
                shutil.copyfileobj(piped, kept)
        yield BatchInput(path, "stdin" if requests == STANDARD else requests)


def _pipe(path: Path) -> BinaryIO | None:
    """An open pipe; None for a file, and for what cannot be opened."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError:
        return None
    if not file.seekable():
        return file
    file.close()
    return None


@contextlib.contextmanager
def _written(answers: str, given: BatchInput, terminal: Terminal) -> Iterator[Answers]:
    """OUTPUT."""
    from npqwen.server.batch_file import BatchOutput

    if answers == STANDARD:
        yield _Stdout(terminal)
        return
    with BatchOutput(Path(answers), given) as output:
        yield output


class _Stdout:
    """Answers that are written to stdout."""

    def __init__(self, terminal: Terminal) -> None:
        self.answered: set[str] = set()
        self._terminal = terminal

    def write(self, answer: dict[str, Any]) -> None:
        from npqwen.server.json_text import json_text

        self._terminal.text(f"{json_text(answer)}\n")
