"""The command `npqwen info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from npqwen.commands.loading import (
    Loading,
    adapter_option,
    bits_option,
    kv_option,
    low_disk_option,
    resolve,
    yarn_option,
)
from npqwen.commands.options import Command
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.engine.cache_type import CacheType


@click.command(cls=Command)
@click.argument("model")
@bits_option
@low_disk_option
@click.option(
    "--context", type=int, metavar="N", help="Count memory for N tokens; default: the model's limit."
)
@yarn_option
@kv_option
@adapter_option
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def info(
    model: str,
    bits: int | None,
    low_disk: bool,
    context: int | None,
    yarn: float | None,
    kv: CacheType | None,
    adapters: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Describe MODEL: shapes, bits per weight, bytes of each part, memory needed, and the kernels that will run.

    Like the other commands, this downloads and converts the model first if necessary.
    """
    from npqwen.hub.names import model_name
    from npqwen.reports.info import describe, inspect

    with Terminal() as terminal:
        path = resolve(model, bits, terminal, low_disk=low_disk)
        found = inspect(path, context, yarn, kv, Loading(adapters=adapters).named_adapters())
        terminal.text((json.dumps(found.as_dict(), indent=2) if as_json else describe(found, model_name(model))) + "\n")
