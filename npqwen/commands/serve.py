"""The command `npqwen serve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from npqwen.commands.loading import (
    Loading,
    Size,
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
from npqwen.text_file import read_text
from npqwen.wording import quoted

if TYPE_CHECKING:
    from npqwen.server.listener import Listener
    from npqwen.server.settings import Settings

PORT = 8000


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds: "300", "5m", "1h30m"; negative: forever."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        from npqwen.server.duration import seconds

        try:
            return seconds(str(value))
        except OptionError as error:
            self.fail(str(error), param, ctx)


class Alias(click.ParamType):  # type: ignore[type-arg]
    """An alias, and the model that it refers to."""

    name = "NAME=MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, model = str(value).partition("=")
        if not (name and equals and model):
            self.fail(f"{value!r} is not a name and a model, such as gpt-4o=Qwen/Qwen3-0.6B", param, ctx)
        return name, model


@click.command(cls=Command)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", metavar="HOST", help="Address to listen on; default: this machine only.")
@click.option(
    "--port", default=PORT, type=int, metavar="N", help=f"Port; 0: any free one; default: {PORT}."
)
@click.option("--uds", metavar="PATH", help="Listen on a UNIX socket instead.")
@click.option("--api-key", "api_keys", multiple=True, metavar="KEY", help="Require this key; may be repeated.")
@click.option("--api-key-file", metavar="FILE", help="Require one of the keys in FILE, one per line.")
@click.option("--tls-cert", metavar="FILE", help="Certificate for HTTPS, in PEM format.")
@click.option("--tls-key", metavar="FILE", help="The certificate's private key.")
@click.option(
    "--cors", "origins", multiple=True, metavar="ORIGIN",
    help="Let web pages of this origin call the server, such as http://localhost:3000; *: any; may be repeated.",
)  # fmt: skip
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME",
    help="A further name under which clients may reach the server; *: any; may be repeated.",
)  # fmt: skip
@click.option(
    "--alias", "aliases", multiple=True, type=Alias(),
    help="Another name for a model; * in NAME stands for any characters; may be repeated.",
)  # fmt: skip
@click.option("--queue", type=int, metavar="N", help="At most N requests wait; default: 64.")
@click.option(
    "--parallel", type=int, metavar="N", help="At most N answers of a model are computed at once; default: 16."
)
@click.option(
    "--keep-alive", default=None, type=Duration(),
    help="Unload a model that has been idle for this long; -1: never; default: 5m, a single model never.",
)  # fmt: skip
@click.option(
    "--memory", default=None, type=Size(), help="Memory that loaded models may use together; default: what is free."
)
@click.option("--log", is_flag=True, help="Write one line for each request to stderr.")
@draft_option
@adapter_option
@prefix_cache_options
@model_options
def serve(
    models: tuple[str, ...],
    loading: Loading,
    quiet: bool,
    host: str,
    port: int,
    uds: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    api_keys: tuple[str, ...],
    api_key_file: str | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    aliases: tuple[tuple[str, str], ...],
    queue: int | None,
    parallel: int | None,
    keep_alive: float | None,
    memory: int | None,
    log: bool,
) -> None:
    """Serve MODEL, or several, by the APIs of OpenAI, Anthropic and ollama, and on a web page.

    The first MODEL is loaded at once and answers requests that name none; others are loaded when a request names them.
    With --adapter NAME=DIR, requests for the model MODEL:NAME, or NAME, use that LoRA adapter.
    """
    terminal = Terminal(quiet=quiet)
    check_server()
    from npqwen.hub.names import model_name
    from npqwen.server.listener import Listener, tls_context
    from npqwen.server.models import Models
    from npqwen.server.serving import log_to_stderr, run
    from npqwen.server.settings import Settings

    names = [argument_text(model) for model in models]
    settings = Settings(
        api_keys=(*map(argument_text, api_keys), *_keys_in(api_key_file)),
        hosts=hosts,
        origins=origins,
        **{name: value for name, value in (("queue", queue), ("parallel", parallel)) if value is not None},
        keep_alive=keep_alive,
        memory=memory,
        aliases={argument_text(name): argument_text(model) for name, model in aliases},
    )
    tls = tls_context(tls_cert, tls_key)
    with terminal, Listener(host, port, uds) as listener:
        served = Models(*offers(names, [model_name(name) for name in names], loading, terminal), settings=settings)
        log_to_stderr(requests=log)
        run(
            served,
            settings,
            listener,
            tls,
            announce=lambda: _announce(terminal, served.names, listener, settings, tls is not None),
            notice=terminal.notice,
        )


def _announce(terminal: Terminal, names: list[str], listener: Listener, settings: Settings, tls: bool) -> None:
    url = listener.url(tls)
    terminal.lines(f"npqwen serves {', '.join(names)} on {url} (Ctrl-C stops)")
    if (network_url := listener.network_url(tls)) is not None:
        terminal.lines(f"for other machines: {network_url}")
    if listener.path is None:
        for what, path in (("page", "/"), ("OpenAI", "/v1"), ("Anthropic", ""), ("ollama", "")):
            if not terminal.quiet:
                terminal.lines(f"  {what:<9} {url}{path}", dim=True)
    if not listener.is_local and not settings.api_keys:
        terminal.lines(
            "warning: everybody who can reach this machine may use the model; --api-key KEY requires a key, and "
            "--host 127.0.0.1 keeps others out"
        )
    if not listener.is_local and not tls and settings.api_keys:
        terminal.notice("without --tls-cert, keys and conversations cross the network unencrypted")


def _keys_in(file: str | None) -> Sequence[str]:
    """The keys in a file: one per line; blank lines, and those that begin with "#", are skipped."""
    if file is None:
        return ()
    lines = read_text(file, f"--api-key-file {quoted(file)}").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise OptionError(f"--api-key-file {quoted(file)} has no key; write one per line")
    return keys
