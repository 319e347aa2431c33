"""How a command loads its model: the flags, and loading by them, with notices and progress on the terminal."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.compile_helper import CompileHelper
from npqwen.commands.completion import words
from npqwen.commands.options import Decorated, argument_text
from npqwen.errors import OptionError
from npqwen.format.recipe import CHOICES, DEFAULT_BITS
from npqwen.terminal.signals import tidied_up
from npqwen.terminal.terminal import Terminal
from npqwen.wording import shortened, size

if TYPE_CHECKING:
    from pathlib import Path

    from npqwen.engine.cache_type import CacheType
    from npqwen.hardware.contention import Contention
    from npqwen.hub.support import Purpose
    from npqwen.model import Model
    from npqwen.server.offer import Offer

_LONG = 10
"""Seconds of processor time of a command that is worth a remark on what delayed it."""
_TOLD = f"{__name__}.told"
_LEAST = 1_000_000
"""Fewer bytes must have a unit: the unit is more likely to be forgotten than so few to be meant."""
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Loading:
    """The flags that determine how a command's model is loaded; see `npqwen.load`. draft: named like MODEL.

    adapters: names and directories. low_disk: see `npqwen.hub.resolve`. Flags that a command lacks have their defaults.
    """

    bits: int | None = None
    threads: int | None = None
    context: int | None = None
    yarn: float | None = None
    kv: CacheType | None = None
    low_disk: bool = False
    prefix_cache: Path | None = None
    prefix_cache_size: int | None = None
    draft: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()

    def named_adapters(self) -> dict[str, str]:
        """The adapters' directories by name.

        Raises OptionError for a name that is given twice, CheckpointError for a directory without a readable adapter.
        """
        from npqwen.format.adapter import AdapterFile, StoredAdapter

        found: dict[str, str] = {}
        for name, directory in self.adapters:
            if name in found:
                raise OptionError(f"--adapter {name} is given twice; give each adapter a name of its own")
            StoredAdapter(AdapterFile.parse(directory))
            found[name] = directory
        return found

    @property
    def first_adapter(self) -> str | None:
        """The name of the adapter that texts use unless they choose another."""
        return self.adapters[0][0] if self.adapters else None

    def options(self, terminal: Terminal) -> dict[str, Any]:
        """Keywords of `npqwen.load` and `Offer.of`; the draft model is downloaded and converted if necessary."""
        draft = None
        if self.draft is not None:
            draft = resolve(argument_text(self.draft), None, terminal, purpose="text", low_disk=self.low_disk)
        return {
            "threads": self.threads,
            "context": self.context,
            "yarn": self.yarn,
            "kv": self.kv,
            "prefix_cache": self.prefix_cache,
            "prefix_cache_size": self.prefix_cache_size,
            "draft": draft,
            "adapters": self.named_adapters(),
            "notice": terminal.notice,
        }


class NamedAdapter(click.ParamType):  # type: ignore[type-arg]
    """A LoRA adapter's directory and its name, by default the directory's."""

    name = "[NAME=]DIR[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        from npqwen.format.adapter import AdapterFile

        text = argument_text(str(value))
        name, equals, directory = text.partition("=")
        if not equals:
            name, directory = AdapterFile.parse(text).directory.resolve().name, text
        if not (name and directory):
            self.fail(f"{value!r} is not a name and a directory, such as sql=./sql-adapter", param, ctx)
        return name, directory


bits_option = click.option(
    "--bits",
    type=int,
    metavar="|".join(CHOICES),
    shell_complete=lambda *_: words(CHOICES),
    help=f"Bits per weight, if not converted yet; default: {DEFAULT_BITS}.",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No notices, progress bars or statistics.")
threads_option = click.option(
    "--threads", "-t", type=int, metavar="N", help="Number of threads; default: one per core."
)
context_option = click.option(
    "--context", type=int, metavar="N", help="Room for N tokens; default: the model's limit."
)

low_disk_option = click.option(
    "--low-disk",
    is_flag=True,
    help="Download and convert one file of weights at a time, and keep none; resumes after an interruption.",
)

yarn_option = click.option(
    "--yarn",
    type=float,
    metavar="FACTOR",
    help="Extend the context by YaRN, to 1 to 4 times the tokens trained on; short texts get a little worse; "
    "default: as in config.json, usually off.",
)


kv_option = click.option(
    "--kv",
    metavar="int8|f16|f32",
    help="Type of the cached keys and values: int8 takes half the memory of f16 and is faster after long texts; "
    "default: int8, with --bits 16 f32.",
)


def model_options(command: Decorated) -> Decorated:
    """Add --bits, --threads, --context, --yarn, --kv, --low-disk and --quiet, for commands that load a model.

    The command receives all but `quiet` as `loading`, a Loading, including the options of `prefix_cache_options`,
    `draft_option` and `adapter_option` above it.
    """
    names = [field.name for field in fields(Loading)]

    @functools.wraps(command)
    def collected(**values: Any) -> Any:
        given = {name: values.pop(name) for name in names if name in values}
        return command(loading=Loading(**given), **values)

    made: Any = collected
    for option in (quiet_option, low_disk_option, kv_option, yarn_option, context_option, threads_option, bits_option):
        made = option(made)
    found: Decorated = made
    return found


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, in powers of ten: "8GB", "500M"."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", str(value).lower(), re.ASCII)
        amount = float(found[1]) * _BYTES[found[2]] if found else 0
        if not 1 <= amount < 2**63:
            self.fail(f"{shortened(str(value))!r} is not a size such as 8GB or 500MB", param, ctx)
        if amount < _LEAST and found and not found[2]:
            self.fail(f"{found[1]} is bytes without a unit; is {found[1]}GB meant?", param, ctx)
        return round(amount)


def _directory(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """The directory that --prefix-cache names, checked before a model is downloaded or loaded."""
    if value is None or ctx.resilient_parsing:
        return None
    from pathlib import Path

    from npqwen.engine.prefix_files import check_directory

    path = Path(value)
    check_directory(path)
    return path


def prefix_cache_options(command: Decorated) -> Decorated:
    """Add --prefix-cache and --prefix-cache-size."""
    command = click.option(
        "--prefix-cache-size",
        type=Size(),
        help="Disk space that --prefix-cache may use; default: 10GB.",
    )(command)
    return click.option(
        "--prefix-cache",
        metavar="DIRECTORY",
        callback=_directory,
        help="Keep what is computed for prompts in this directory, so that later runs do not compute it again; "
        "default: only in memory.",
    )(command)


draft_option = click.option(
    "--draft",
    metavar="MODEL",
    help="A smaller model with the same tokenizer that drafts the next tokens, where that is faster; the text stays "
    "the same; default: none.",
)


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=NamedAdapter(),
    help="Load a LoRA adapter that PEFT saved, its effect multiplied by SCALE, under this name or the directory's; "
    "may be repeated; default: none.",
)


def resolve(
    model: str, bits: int | None, terminal: Terminal, *, purpose: Purpose = "arrays", low_disk: bool = False
) -> Path:
    """The converted directory of MODEL, downloaded and converted first if necessary, with notices and progress.

    purpose, low_disk: see `npqwen.hub.resolve`.
    """
    from npqwen import hub

    with tidied_up():
        return hub.resolve(
            model,
            bits,
            purpose=purpose,
            low_disk=low_disk,
            notice=terminal.notice,
            progress=terminal.progress("converting"),
            download_bars=terminal.shows_bars,
        )


def open_model(
    model: str, loading: Loading, terminal: Terminal, *, purpose: Purpose = "arrays"
) -> Model:
    """Load MODEL, downloaded and converted first if necessary, with notices and progress on the terminal.

    purpose: see `npqwen.hub.resolve`.
    """
    from npqwen.hardware.contention import Contention, too_many_threads

    contention = Contention()
    loading.named_adapters()  # report errors in them before a download
    path = resolve(model, loading.bits, terminal, purpose=purpose, low_disk=loading.low_disk)
    options = loading.options(terminal)

    from npqwen.hardware.machine import available_memory
    from npqwen.hub.names import model_name
    from npqwen.model import load

    helper = CompileHelper(path, loading.kv, terminal.compilation_progress)
    loaded = load(path, name=model_name(model), on_compile=helper, **options)
    available = available_memory()
    if available is not None and loaded.weight_bytes > available:
        terminal.notice(
            f"the weights are {size(loaded.weight_bytes)}, but only {size(available)} of memory is available: "
            "the rest will be read from disk again and again"
        )
    crowded = too_many_threads(loaded.threads)
    if crowded is not None:
        terminal.notice(crowded)
    else:
        _tell_later(contention, loaded.threads, terminal)
    return loaded


def _tell_later(contention: Contention, threads: int, terminal: Terminal) -> None:
    """When the command ends, tell once whether other programs delayed it, if it was a long one."""
    ctx = click.get_current_context(silent=True)
    if ctx is None or _TOLD in ctx.meta:
        return
    ctx.meta[_TOLD] = True

    def tell() -> None:
        found = contention.hint(threads, _LONG)
        if found is not None:
            terminal.notice(found)

    ctx.call_on_close(tell)


def offers(models: Sequence[str], names: Sequence[str], loading: Loading, terminal: Terminal) -> list[Offer]:
    """Offers of several MODELs, downloaded and converted first if necessary.

    names: the names that requests use for them. Raises OptionError without `npqwen[server]`.
    """
    check_server()
    from npqwen.server.offer import Offer

    if loading.adapters and len(models) > 1:
        raise OptionError("--adapter needs a single MODEL, as an adapter belongs to one; serve others by themselves")
    options = loading.options(terminal)
    paths = [resolve(model, loading.bits, terminal, low_disk=loading.low_disk) for model in models]
    return [
        Offer.of(path, name, on_compile=CompileHelper(path, loading.kv, terminal.compilation_progress), **options)
        for path, name in zip(paths, names, strict=True)
    ]


def check_server() -> None:
    """Raise OptionError unless the server's dependencies are installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise OptionError(f'{error.name} is not installed; pip install "npqwen[server]"') from None
