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
    yarn_option,
)
from npqwen.commands.options import Command
from npqwen.errors import OptionError
from npqwen.format.recipe import DEFAULT_BITS
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.engine.cache_type import CacheType
    from npqwen.reports.conversion_plan import ConversionPlan
    from npqwen.reports.info import Info


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

    Of a model that is not converted yet, the sizes and the memory, as `npqwen convert --dry-run` shows them: no weights
    are downloaded, and nothing is converted.
    """
    from npqwen import hub
    from npqwen.hub.names import model_name

    with Terminal() as terminal:
        path = hub.find_converted(model, bits, notice=terminal.notice, download_bars=terminal.shows_bars)
        if path is not None:
            from npqwen.reports.info import describe, inspect

            found = inspect(path, context, yarn, kv, Loading(adapters=adapters).named_adapters())
            terminal.text((_json(found) if as_json else describe(found, model_name(model))) + "\n")
            return
        if adapters:
            raise OptionError(f"{model} is not converted yet; adapters are counted after npqwen pull {model}")
        from npqwen.reports.conversion_plan import plan_conversion

        planned = plan_conversion(
            model,
            bits=DEFAULT_BITS if bits is None else bits,
            low_disk=low_disk,
            context=context,
            yarn=yarn,
            kv=kv,
        )
        terminal.notice(f"{model} is not converted yet; this is what a conversion will give and need")
        terminal.text((_json(planned) if as_json else planned.describe()) + "\n")


def _json(found: Info | ConversionPlan) -> str:
    return json.dumps(found.as_dict(), indent=2)
