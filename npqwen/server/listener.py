"""The sockets that a server listens on, and its certificate."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from npqwen.checks import check_whole
from npqwen.errors import OptionError
from npqwen.server.accepting import AcceptingSocket
from npqwen.server.settings import is_address
from npqwen.wording import quoted

if TYPE_CHECKING:
    from typing_extensions import Self

_LOOPBACK = ("127.", "::1")


class Listener:
    """Sockets bound to an address or to a path: clients are refused until the server listens on them.

    Raises OptionError if the address is taken, or is not this machine's.
    """

    def __init__(self, host: str, port: int, path: str | None) -> None:
        """port: 0 for any free one. path: of a UNIX socket, in place of host and port."""
        check_whole("port", port, 0, 65535)
        self.host = host.removeprefix("[").removesuffix("]")
        self.path = path
        self.sockets = [_bound_path(path)] if path is not None else _bound(self.host, port)

    @property
    def port(self) -> int:
        """The port, chosen by the system if it was 0; 0 for a UNIX socket."""
        return 0 if self.path is not None else int(self.sockets[0].getsockname()[1])

    @property
    def is_local(self) -> bool:
        """Whether only this machine's programs can connect."""
        return self.path is not None or all(s.getsockname()[0].startswith(_LOOPBACK) for s in self.sockets)

    @property
    def names(self) -> list[str]:
        """Host names besides localhost under which clients reach it: the one that was bound, and this machine's."""
        found = [] if self.path is not None or is_address(self.host) else [self.host]
        if not self.is_local:
            own = socket.gethostname()
            found += [own, f"{own.partition('.')[0]}.local"]
        return found

    def url(self, tls: bool) -> str:
        """Its address for clients on this machine."""
        if self.path is not None:
            return f"unix:{self.path}"
        return self._url({"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), tls)

    def network_url(self, tls: bool) -> str | None:
        """Its address for other machines if it listens on all addresses of this one; None if `url` is the only one."""
        if self.path is not None or self.host not in ("", "0.0.0.0", "::"):
            return None
        return self._url(_network_address(self.sockets[0].family) or socket.gethostname(), tls)

    def _url(self, host: str, tls: bool) -> str:
        return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.sockets:
            one.close()
        if self.path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _network_address(family: int) -> str | None:
    """The address that this machine has on its network; None without one. family: of the address."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            # An address of no machine (RFC 5737, 3849). Connecting sends nothing: it only looks up the route.
            one.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
            address = str(one.getsockname()[0])
    except OSError:
        return None
    return None if address.startswith(_LOOPBACK) else address


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """The TLS context for HTTPS; None without certificate and key. Raises OptionError for files that cannot be used."""
    if certificate is None:
        if key is not None:
            raise OptionError("--tls-key needs --tls-cert, the certificate that the key belongs to")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for flag, file in (("--tls-cert", certificate), ("--tls-key", key)):
        if file is not None and not Path(file).is_file():
            raise OptionError(f"{flag}: the file {quoted(file)} does not exist")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = error.args[-1] if error.args else error
        names = quoted(certificate) if key is None else f"{quoted(certificate)} and {quoted(key)}"
        raise OptionError(f"{names} cannot be used as certificate and private key in PEM format: {reason}") from None
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; decrypt it first")


def _bound(host: str, port: int) -> list[AcceptingSocket]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise OptionError(f"--host {quoted(host)} is not an address or a name of this machine") from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if port == 0:
        addresses = addresses[:1]  # two sockets would get two ports
    sockets: list[AcceptingSocket] = []
    try:
        for family, address in addresses:
            # asyncio sets TCP_NODELAY only on sockets created with this protocol; without it, chunks wait for 40 ms
            one = AcceptingSocket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(one)
            if sys.platform == "win32":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
    except OSError as error:
        for one in sockets:
            one.close()
        raise _not_bound(error, host, port) from None
    return sockets


def _not_bound(error: OSError, host: str, port: int) -> OptionError:
    if error.errno == errno.EADDRINUSE or (error.errno == errno.EACCES and sys.platform == "win32"):
        return OptionError(f"port {port} of {host} is taken by another program; choose another --port, or 0 for any")
    if error.errno in (errno.EACCES, errno.EPERM):
        return OptionError(f"this user may not listen on port {port}; choose one above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return OptionError(f"--host {host} is not an address of this machine; 0.0.0.0 stands for all of its addresses")
    return OptionError(f"cannot listen on port {port} of {host}: {error.strerror or error}")


def _bound_path(path: str) -> AcceptingSocket:
    """A UNIX socket that only this user may connect to. A stale one, left by a dead server, is replaced."""
    if sys.platform == "win32" or not hasattr(socket, "AF_UNIX"):
        raise OptionError("--uds needs a system with UNIX sockets; use --host and --port")
    place = Path(path)
    one = AcceptingSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if place.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise OptionError(f"--uds {quoted(path)} is taken by another program")
            place.unlink()
        before = os.umask(0o177)
        try:
            one.bind(path)
        finally:
            os.umask(before)
    except OSError as error:
        one.close()
        raise OptionError(f"--uds {quoted(path)}: cannot listen there: {error.strerror or error}") from None
    except OptionError:
        one.close()
        raise
    return one
