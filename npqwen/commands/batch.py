"""The command `npqwen batch`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from npqwen.commands.loading import (
    Loading,
    adapter_option,
    check_server,
    draft_option,
    model_options,
    offers,
    prefix_cache_options,
)
from npqwen.commands.options import Command, argument_text
from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal

SOME_FAILED = 1


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
    lacks, and tries again what failed. Exit status 1: the answers of some requests are errors.
    """
    check_server()
    from npqwen.hub.names import model_name
    from npqwen.server import batch_run
    from npqwen.server.batch_file import BatchInput, BatchOutput
    from npqwen.server.models import Models
    from npqwen.server.settings import Settings

    settings = Settings() if parallel is None else Settings(parallel=parallel)
    given = BatchInput(Path(requests))
    names = sorted(given.models) if model is None else [argument_text(model)]
    if "" in names:
        raise OptionError(f"{requests} has requests that name no model; name it with --model")
    if loading.adapters and model is None:
        raise OptionError("--adapter needs --model MODEL, the model that it belongs to")
    with Terminal(quiet=quiet) as terminal, BatchOutput(Path(answers), given) as output:
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
            progress=terminal.batch_progress,
        )
        seconds = time.perf_counter() - start
        failed = f", {counts.failed} of them with an error" if counts.failed else ""
        rate = f"; {counts.tokens / seconds:.1f} generated tokens/s" if counts.tokens else ""
        terminal.notice(f"{counts.answered} answered in {seconds:.1f} s{failed}{rate}")
    if counts.failed:
        raise click.exceptions.Exit(SOME_FAILED)
