"""The command `npqwen rerank`."""

from __future__ import annotations

import time
from contextlib import closing

import click

from npqwen.commands.loading import Loading, model_options, open_model
from npqwen.commands.options import Command, argument_text
from npqwen.commands.records import json_lines, read_records
from npqwen.terminal.terminal import Terminal


@click.command(cls=Command)
@click.argument("model")
@click.argument("query")
@click.argument("file", default="-")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Write only the N best; default: all.")
@click.option("--instruction", metavar="TEXT", help="What is searched for; default: passages that answer a web search.")
@click.option("--jsonl", "as_json", is_flag=True, help="Lines of FILE are JSON: strings, or objects with a text.")
@click.option("--output", "-o", metavar="FILE", help="Write there instead of stdout.")
@model_options
def rerank(
    model: str,
    query: str,
    file: str,
    top: int | None,
    instruction: str | None,
    as_json: bool,
    output: str | None,
    loading: Loading,
    quiet: bool,
) -> None:
    """Sort the lines of FILE by how well they answer QUERY, by a reranker, and write JSON lines, the best first.

    Each has the text, its index in FILE (without blank lines, from 0) and its score from 0 to 1. Without FILE, or with
    -, lines come from stdin. JSON lines (--jsonl, or a FILE that ends in .jsonl) keep their other fields.
    """
    terminal = Terminal(quiet=quiet)
    query = argument_text(query)
    task = None if instruction is None else argument_text(instruction)
    records = read_records(argument_text(file), as_json, terminal, "the documents")
    with (
        terminal,
        closing(open_model(model, loading, terminal, purpose="reranking")) as loaded,
    ):
        started = time.perf_counter()
        documents = [record.text for record in records]
        with json_lines(output, terminal) as write:
            ranking = loaded.rerank(query, documents, task, progress=terminal.progress("reading", " texts"))
            seconds = time.perf_counter() - started
            for index in ranking.order[:top]:
                write({**records[index].fields, "index": index, "score": float(ranking.scores[index])})
        terminal.notice(
            f"{len(records)} documents in {seconds:.2f} s, {len(records) / max(seconds, 1e-9):.1f} per second"
        )
