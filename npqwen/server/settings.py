"""What a server allows: keys, hosts, origins, and limits of size, number and time."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from npqwen.checks import check_number, check_whole, suggestion
from npqwen.errors import OptionError
from npqwen.generation.batch import PARALLEL
from npqwen.server.worker import QUEUE
from npqwen.wording import quoted

BODY_LIMIT = 32_000_000
"""Default limit of a request's body in bytes: one that fills a context of 262,144 tokens has a few million."""
KEEP_ALIVE = 300.0
"""Default seconds after which an idle model is unloaded, if there are several models."""

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", re.ASCII)
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s,]+", re.ASCII)


@dataclass(frozen=True)
class Settings:
    """Settings of a server, checked. Raises OptionError.

    api_keys: a request must have one of them, as `Authorization: Bearer KEY` or `x-api-key: KEY`; none: no key needed.
    hosts: names besides localhost under which clients may reach the server; "*" allows any.
    origins: sites whose pages may call the server from a browser, such as "http://localhost:3000"; "*" allows any.
    body_limit: most bytes of a request's body. queue: most requests that wait for a model. parallel: most sequences of
    a model that run at once.
    keep_alive: seconds after which an idle model is unloaded; negative: never; None: `KEEP_ALIVE` if there are several
    models, never if there is one. memory: bytes that the loaded models, and the keys and values of requests, may take
    together; None: the available memory.
    aliases: further names of models; a name may contain "*", which matches any characters.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_limit: int = BODY_LIMIT
    queue: int = QUEUE
    parallel: int = PARALLEL
    keep_alive: float | None = None
    memory: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("api_keys", "hosts", "origins"):
            value = getattr(self, name)
            strings = isinstance(value, Collection) and all(isinstance(one, str) for one in value)
            if isinstance(value, str) or not strings:
                raise OptionError(f"{name} is {quoted(value)}; it must be a sequence of strings")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "origins", tuple(origin.lower().rstrip("/") for origin in self.origins))
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise OptionError("an API key must be printable ASCII without spaces, and not empty")
        for host in self.hosts:
            if host != "*" and not _HOST_NAME.fullmatch(host) and not is_address(host):
                raise OptionError(f"{quoted(host)} is not a host name; give a name such as raspberrypi.local, or *")
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                example = "give scheme, host and port, such as http://localhost:3000, or *"
                raise OptionError(f"{quoted(origin)} is not an origin; {example}")
        check_whole("body_limit", self.body_limit, 1)
        check_whole("queue", self.queue, 1)
        check_whole("parallel", self.parallel, 1)
        if self.memory is not None:
            check_whole("memory", self.memory, 1)
        if self.keep_alive is not None:
            check_number("keep_alive", self.keep_alive, -1e9, 1e9)
        if not isinstance(self.aliases, Mapping):
            raise OptionError(f"aliases is {quoted(self.aliases)}; it must be a dictionary of names of models")
        for alias, model in self.aliases.items():
            if not isinstance(alias, str) or not isinstance(model, str) or not alias or not model:
                raise OptionError(f"aliases has {quoted(alias)}: {quoted(model)}; both must be names of models")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Settings:
        """Settings by name; OptionError for an unknown name."""
        known = [one.name for one in fields(cls)]
        for name in settings:
            if name not in known:
                raise OptionError(f"unknown setting {quoted(name)}; {suggestion(name, known)}")
        return cls(**settings)


def is_address(host: str) -> bool:
    """Whether a host is a numeric address; IPv6 with or without brackets."""
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
