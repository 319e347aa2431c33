"""The command `npqwen embed`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npqwen.commands.loading import Loading, model_options, open_model
from npqwen.commands.options import Command, argument_text
from npqwen.commands.records import Record, json_lines, read_records
from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal
from npqwen.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from npqwen.model import Model

_BLOCK = 256
"""Texts per block, whose vectors are computed before they are written."""


@click.command(cls=Command)
@click.argument("model")
@click.argument("file", default="-")
@click.option("--query", is_flag=True, help="The texts are queries: the model's own instruction comes before them.")
@click.option("--instruction", metavar="TEXT", help="The texts are queries, and this says what they search for.")
@click.option("--dimensions", type=int, metavar="N", help="Length of the vectors, at least 32; default: the model's.")
@click.option("--no-truncate", is_flag=True, help="Refuse texts that are longer than the context; default: cut them.")
@click.option("--jsonl", "as_json", is_flag=True, help="Lines of FILE are JSON: strings, or objects with a text.")
@click.option(
    "--output", "-o", metavar="FILE", help="Write there instead of stdout; FILE.npy: a NumPy array with a row per text."
)
@model_options
def embed(
    model: str,
    file: str,
    query: bool,
    instruction: str | None,
    dimensions: int | None,
    no_truncate: bool,
    as_json: bool,
    output: str | None,
    loading: Loading,
    quiet: bool,
) -> None:
    """Make a vector of each line of FILE by an embedding model, and write JSON lines: the text and its embedding.

    Without FILE, or with -, lines come from stdin. JSON lines (--jsonl, or a FILE that ends in .jsonl) keep their other
    fields. Documents need no instruction; queries do (--query).
    """
    terminal = Terminal(quiet=quiet)
    if query and instruction is not None:
        raise OptionError("--query and --instruction exclude each other; give one of them")
    task = argument_text(instruction) if instruction is not None else query or None
    records = read_records(argument_text(file), as_json, terminal, "the texts")
    with (
        terminal,
        closing(open_model(model, loading, terminal, purpose="embedding")) as loaded,
    ):
        loaded.embedder.dimensions(dimensions)  # reject the option before a file is created
        started = time.perf_counter()

        def vectors(at: int) -> NDArray[np.float32]:
            return _vectors(loaded, records, at, task, dimensions, not no_truncate, terminal)

        if output is not None and Path(output).suffix.lower() == ".npy":
            _write_array(Path(output), (vectors(at) for at in range(0, len(records), _BLOCK)), loaded, dimensions)
        else:
            with json_lines(output, terminal) as write:
                for at in range(0, len(records), _BLOCK):
                    for record, vector in zip(records[at : at + _BLOCK], vectors(at), strict=True):
                        write({**record.fields, "embedding": vector.tolist()})
        seconds = time.perf_counter() - started
        rate = f", {len(records) / max(seconds, 1e-9):.1f} per second" if len(records) > 1 else ""
        terminal.notice(f"{counted(len(records), 'text')} in {seconds:.2f} s{rate}")


def _vectors(
    model: Model,
    records: list[Record],
    at: int,
    instruction: str | bool | None,
    dimensions: int | None,
    truncate: bool,
    terminal: Terminal,
) -> NDArray[np.float32]:
    """The vectors of the block of texts that starts at `records[at]`: (texts, dimensions)."""

    def progress(done: int, total: int) -> None:
        terminal.progress("reading", " texts")(at + done, len(records))

    from npqwen.retrieval.reader import Reader

    embedder, block = model.embedder, records[at : at + _BLOCK]
    ids = embedder.ids([one.text for one in block], instruction, truncate, [one.place for one in block])
    return embedder.vectors(Reader(model).read(ids, progress), embedder.dimensions(dimensions))


def _write_array(
    path: Path, blocks: Iterable[NDArray[np.float32]], model: Model, dimensions: int | None
) -> None:
    import numpy as np

    from npqwen.atomic_file import new_file

    empty = np.zeros((0, model.embedder.dimensions(dimensions)), np.float32)
    with new_file(path) as file:  # reject an unwritable path before anything is computed
        np.save(file, np.concatenate([empty, *blocks]))
