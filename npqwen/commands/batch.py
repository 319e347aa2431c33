"""The command `npqwen batch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npqwen.commands.options import (
    Command,
    argument_text,
    bits_option,
    context_option,
    draft_option,
    kv_option,
    low_disk_option,
    prefix_cache_options,
    quiet_option,
    resolve,
    resolve_draft,
    threads_option,
    yarn_option,
)
from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.engine.cache_type import CacheType

SOME_FAILED = 1


@click.command(cls=Command)
@click.argument("requests", metavar="INPUT")
@click.argument("answers", metavar="OUTPUT")
@click.option("--model", metavar="MODEL", help="Answer with MODEL, whatever model the requests name.")
@click.option("--any-order", is_flag=True, help="Write each answer as soon as it is complete.")
@click.option("--parallel", type=int, metavar="N", help="Compute at most N answers at once; default: 16.")
@draft_option
@prefix_cache_options
@bits_option
@threads_option
@context_option
@yarn_option
@kv_option
@low_disk_option
@quiet_option
def batch(
    requests: str,
    answers: str,
    model: str | None,
    any_order: bool,
    parallel: int | None,
    bits: int | None,
    threads: int | None,
    context: int | None,
    low_disk: bool,
    yarn: float | None,
    kv: CacheType | None,
    prefix_cache: Path | None,
    prefix_cache_size: int | None,
    draft: str | None,
    quiet: bool,
) -> None:
    """Answer the requests of INPUT, a file in OpenAI's batch format, and write the answers to OUTPUT.

    INPUT has one JSON object a line: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body":
    {"model": ..., "messages": [...]}}. Run again after an interruption, the command answers what OUTPUT lacks. Exit
    status 1: the answers of some requests are errors.
    """
    try:
        import starlette  # noqa: F401
    except ModuleNotFoundError as error:
        raise OptionError(f'{error.name} is not installed; pip install "npqwen[server]"') from None
    from npqwen.hub.names import model_name
    from npqwen.server import batch_run
    from npqwen.server.batch_file import BatchInput, BatchOutput
    from npqwen.server.models import Models
    from npqwen.server.offer import Offer
    from npqwen.server.settings import Settings

    settings = Settings() if parallel is None else Settings(parallel=parallel)
    given = BatchInput(Path(requests))
    names = sorted(given.models) if model is None else [argument_text(model)]
    if "" in names:
        raise OptionError(f"{requests} has requests that name no model; name it with --model")
    with Terminal(quiet=quiet) as terminal, BatchOutput(Path(answers), given) as output:
        if output.answered:
            terminal.notice(f"{len(output.answered)} of {len(given.custom_ids)} are answered already")
        draft_path = None if draft is None else resolve_draft(draft, terminal, low_disk)
        offers = [
            Offer.of(
                resolve(name, bits, terminal, low_disk=low_disk),
                name if model is None else model_name(name),
                threads=threads,
                context=context,
                yarn=yarn,
                kv=kv,
                prefix_cache=prefix_cache,
                prefix_cache_size=prefix_cache_size,
                draft=draft_path,
                notice=terminal.notice,
                on_compile=terminal.compilation_progress,
            )
            for name in names
        ]
        start = time.perf_counter()
        counts = batch_run.run(
            Models(*offers, settings=settings),
            settings,
            given,
            output,
            model=None if model is None else offers[0].name,
            ordered=not any_order,
            progress=terminal.batch_progress,
        )
        seconds = time.perf_counter() - start
        failed = f", {counts.failed} of them with an error" if counts.failed else ""
        rate = f"; {counts.tokens / seconds:.1f} generated tokens/s" if counts.tokens else ""
        terminal.notice(f"{counts.answered} answered in {seconds:.1f} s{failed}{rate}")
    if counts.failed:
        raise click.exceptions.Exit(SOME_FAILED)
