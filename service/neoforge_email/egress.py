"""HTTP to where customers say, and nowhere else: no address of ours can be reached through it, whatever a URL spells, a name
resolves to, or an answer redirects to.

A name's addresses are looked up once a connection and all of them are judged; the socket is made for one of these very
addresses and judged again there, so that a second, different answer of the name server is of no use (DNS rebinding). The host
name stays what TLS verifies and what the `Host` header says.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType
from yarl import URL

from . import __version__
from .settings import Settings

ANSWER_BYTES = 4096  # of an answer's body that are read
ANSWER_CHARACTERS = 500  # of it that are kept
ANSWER_PATIENCE = timedelta(seconds=5)  # for its body, once its status is known
URL_CHARACTERS = 2000
KEEP_ALIVE = timedelta(
    seconds=4
)  # less than servers keep a connection, so that none is found closed when it is used again
LOOKUPS = 64  # at a time; a name server that answers slowly holds up its own endpoints alone

Lookup = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host name; raises OSError."""

# Not where a customer's server is, though partly global by their registry: protocols' own addresses (RFC 6890), relays of
# 6to4 (RFC 7526), a cloud's service for its machines.
_NEVER_V4 = (ip_network("192.0.0.0/24"), ip_network("192.88.99.0/24"), ip_network("168.63.129.16/32"))
# All that is routed lies in 2000::/3, which leaves out mapped, compatible and NAT64 forms. Left out as well are what carries an
# IPv4 address (Teredo, in 2001::/23; 6to4) and documentation (RFC 9637, which Python may not know).
_ROUTED = IPv6Network("2000::/3")
_NEVER_V6 = (ip_network("2001::/23"), ip_network("2002::/16"), ip_network("3fff::/20"))

_HOST_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.IGNORECASE)


class NotPublic(OSError):
    """An address that customers' requests must not reach. The text does not name it: it may be a secret of our name server."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address is global unicast: on the internet, and no other address in disguise."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NEVER_V4)
    return address in _ROUTED and not any(address in network for network in _NEVER_V6)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request. Without `status` there was no answer, and `text` says why; else it is the answer's body.

    `text` is one line of at most `ANSWER_CHARACTERS`. `retry_after` is what the answer asks for.
    """

    status: int | None
    text: str
    retry_after: timedelta | None = None


class Egress:
    """An HTTP client for URLs of strangers; an asynchronous context manager.

    `allowed` are networks that may be reached although they are not public, `timeout` bounds a request in all, from the
    look-up to the answer's status.
    """

    def __init__(
        self,
        *,
        allowed: Sequence[str] = (),
        allow_http: bool = False,
        timeout: timedelta = timedelta(seconds=30),
        lookup: Lookup | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed: list[IPv4Network | IPv6Network] = [ip_network(network) for network in allowed]
        self._allow_http = allow_http
        self._timeout = timeout
        self._lookup = lookup or self._ask_name_server
        self._tls = tls
        self._threads: ThreadPoolExecutor | None = None
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, settings: Settings) -> Egress:
        return cls(
            allowed=settings.webhook_allowed_networks,
            allow_http=settings.webhook_allow_http,
            timeout=settings.webhook_timeout,
        )

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            resolver=_Resolver(self.addresses),
            socket_factory=self._socket,
            use_dns_cache=False,
            limit=0,
            keepalive_timeout=KEEP_ALIVE.total_seconds(),
            ssl=self._tls or True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            skip_auto_headers=["Accept-Encoding"],
            headers={"User-Agent": f"NeoForge-Email/{__version__}", "Accept": "*/*"},
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    def check(self, text: str) -> URL:
        """The URL as it will be used. Raises ValueError with what to change, in a sentence's middle."""
        if len(text) > URL_CHARACTERS or not text.isprintable() or re.search(r"[\s\\]", text):
            raise ValueError(f"must be a URL of at most {URL_CHARACTERS} characters without spaces or backslashes")
        schemes = ("https", "http") if self._allow_http else ("https",)
        try:
            url = URL(text)
            host, port = url.raw_host, url.port
        except ValueError:
            raise ValueError("must be a URL such as https://example.com/webhooks") from None
        if url.scheme not in schemes:
            raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        if not host or port is None:
            raise ValueError("must name a host, such as https://example.com/webhooks")
        if url.raw_user is not None or url.raw_password is not None:
            raise ValueError("must not hold a user or a password: verify the signature instead")
        if url.raw_fragment:
            raise ValueError("must not have a fragment (#…), which is never sent")
        if port not in {443, 80} and port < 1024:
            raise ValueError("must use port 443, 80 or one from 1024 up")
        address = _literal(host)
        if address is not None and not self._may_reach(address):
            raise ValueError("must be reachable from the internet: this address is not public")
        return url

    async def addresses(self, host: str, port: int) -> list[str]:
        """Where a host is, at this moment. Raises NotPublic if any of its addresses is not public, OSError if it has none."""
        found = await self._lookup(host, port)
        if not found:
            raise OSError("the name has no address")
        for text in found:
            address = ip_address(text)  # with a zone (fe80::1%eth0) it stays what it is, and is not global
            if not self._may_reach(address):
                raise NotPublic("the name leads to an address that is not public")
        return found

    async def post(self, text: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Post once; whatever happens is an answer. Redirects are not followed, cookies and proxies not used."""
        assert self._session is not None
        try:
            url = self.check(text)
        except ValueError as error:
            return Answer(None, f"not sent: the URL {error}")
        try:
            async with (
                asyncio.timeout(self._timeout.total_seconds()) as limit,
                self._session.post(url, data=body, headers=dict(headers), allow_redirects=False) as response,
            ):
                limit.reschedule(None)
                retry_after = _retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
                return Answer(response.status, await _beginning(response), retry_after)
        except TimeoutError:
            return Answer(None, f"no answer within {self._timeout.total_seconds():g} seconds")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(None, one_line(f"no answer: {_reason(error)}"))

    def _may_reach(self, address: IPv4Address | IPv6Address) -> bool:
        return is_public(address) or any(address in network for network in self._allowed)

    def _socket(self, target: AddrInfoType) -> socket.socket:
        """Every socket of a connection is made here, for the very address that it connects to."""
        family, kind, protocol, _, address = target
        if not self._may_reach(ip_address(address[0])):
            raise NotPublic("the address is not public")
        return socket.socket(family, kind, protocol)

    async def _ask_name_server(self, host: str, port: int) -> list[str]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="lookup")
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        )
        return list(dict.fromkeys(str(info[4][0]) for info in infos))


class _Resolver(AbstractResolver):
    def __init__(self, addresses: Lookup) -> None:
        self._addresses = addresses

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - both are always wanted
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in await self._addresses(host, port)
        ]

    async def close(self) -> None:
        """There is nothing to close."""


def one_line(text: str) -> str:
    """What people can read of a text, on one line of at most `ANSWER_CHARACTERS`."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:ANSWER_CHARACTERS]


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a URL's host is, or None for a name. Raises ValueError for an address in an odd spelling."""
    try:
        return ip_address(host)
    except ValueError:
        # the C library takes 127.1, 0x7f000001 and 017700000001 for addresses; so does the URL standard
        if _HOST_NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            raise ValueError("must have a name as its host, or an address in its usual spelling") from None
        return None


async def _beginning(response: aiohttp.ClientResponse) -> str:
    """The beginning of a body as text. Its connection is used again only where that was all."""
    body = b""
    try:
        async with asyncio.timeout(ANSWER_PATIENCE.total_seconds()):
            while len(body) < ANSWER_BYTES and (part := await response.content.read(ANSWER_BYTES - len(body))):
                body += part
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass  # the status has been said
    if not response.content.at_eof():
        response.close()
    return one_line(body.decode(errors="replace"))


def _retry_after(value: str | None, now: datetime) -> timedelta | None:
    """`Retry-After` (RFC 9110, 10.2.3) in seconds or as a date; None for anything else and for the past."""
    if value is None:
        return None
    try:
        wait = timedelta(seconds=int(value)) if value.isdecimal() else parsedate_to_datetime(value) - now
    except (ValueError, TypeError, OverflowError):
        return None
    return wait if wait > timedelta() else None


def _reason(error: Exception) -> str:
    """Why there was no answer, without addresses: our name server may know what customers must not."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({cause.verify_message})"
    if isinstance(cause, NotPublic):
        return str(cause)
    if isinstance(cause, socket.gaierror):
        return "its name is not found"
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno).lower()  # its own text may name the address
    return "it closed the connection" if isinstance(cause, aiohttp.ServerDisconnectedError) else type(cause).__name__
