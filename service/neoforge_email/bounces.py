"""`neoforge bounces`: an SMTP server for the mail that comes back.

    MX of BOUNCE_DOMAIN ─► RCPT TO a return path of ours ─► DATA ─► receipt committed ─► 250, then the doorbell

It relays nothing and answers 250 only for what is stored, each mail once however often it comes. While PostgreSQL is away
the answer is 451, and the sender keeps the mail and tries again, as it does for days with every 4xx. The worker makes events
of the receipts (`inbound/dsn.py`).

The protocol is aiosmtpd's, but for the reading of DATA: its own keeps a line without an end as long as it goes on, whatever
the size limit, so that one connection could take all memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from aiosmtpd.smtp import SMTP, Envelope, Session

from . import db
from .doorbell import Doorbell
from .errors import DatabaseUnavailable, SettingsError
from .inbound import dsn, receipts
from .observability import BOUNCES_RECEIVED, DOORBELL_ERRORS
from .redis import connect
from .settings import Settings

log = structlog.get_logger(__name__)

MAILBOXES = frozenset({"abuse", "fbl", "postmaster"})
"""Local parts at BOUNCE_DOMAIN beside the return paths: for feedback loops, and by RFC 5321 4.5.1."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask of the listener. None of it loses a mail: after a 4xx its sender tries again.

    Whoever has a message of ours can write to its return path, so that what is stored is bounded by the hour as well.
    `idle` is RFC 5321's (4.5.3.2.7), for a command as for a whole DATA.
    """

    connections: int = 100
    connections_a_peer: int = 20
    mail_bytes: int = 1 << 20
    recipients: int = 100
    bytes_an_hour: int = 256 << 20
    idle: timedelta = timedelta(minutes=5)
    session: timedelta = timedelta(hours=1)


COMMANDS = {"MAIL": 1000, "RCPT": 1000, "DATA": 1000, "RSET": 1000, "*": 20}
"""How often a session may send each."""

LINGER = timedelta(seconds=5)

_PATH = re.compile(r"<(?:@[^<>:]*:)?([^<>]*)>\s*(.*)")


async def run(settings: Settings, limits: Limits | None = None) -> None:
    """Take mail until SIGTERM or SIGINT. Raises SettingsError if it cannot."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with listening(settings, limits):
        log.info("bounces.started", domain=settings.bounce_domain)
        await stopped.wait()
    log.info("bounces.stopped")


@asynccontextmanager
async def listening(settings: Settings, limits: Limits | None = None) -> AsyncIterator[None]:
    """Take mail while the context lasts; on the way out finish what has come within GRACEFUL_SHUTDOWN_TIMEOUT."""
    if settings.bounce_domain is None:
        raise SettingsError(
            "BOUNCE_DOMAIN: set it to the domain whose MX record points here, such as bounces.example.com"
        )
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # aiosmtpd's, which holds addresses
    async with AsyncExitStack() as stack:
        pool = await db.create_pool(settings, settings.database_url, "neoforge-bounces")
        stack.callback(pool.terminate)
        redis = connect(settings)
        stack.push_async_callback(redis.aclose)
        doorbell = Doorbell(redis, settings.doorbell_channel, DOORBELL_ERRORS.inc)
        doorbell.start()
        stack.push_async_callback(doorbell.close)
        listener = Listener(pool, doorbell, settings, limits or Limits())
        stack.push_async_callback(listener.close, settings.graceful_shutdown_timeout)
        for server in await _servers(listener, settings):
            stack.callback(server.close)
        yield


async def _servers(listener: Listener, settings: Settings) -> list[asyncio.Server]:
    """On the sockets that systemd opened (sd_listen_fds(3)), so that port 25 needs no privilege; else on BOUNCE_HOST."""
    loop = asyncio.get_running_loop()
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        given = [socket.socket(fileno=3 + number) for number in range(int(os.environ["LISTEN_FDS"]))]
        return [await loop.create_server(listener.session, sock=each) for each in given]
    hosts = [host.strip() for host in settings.bounce_host.split(",")]
    try:
        return [await loop.create_server(listener.session, hosts, settings.bounce_port)]
    except OSError as error:
        raise SettingsError(f"BOUNCE_HOST, BOUNCE_PORT: {error.strerror}") from None


class Listener:
    """The sessions of a process, and what a mail has to pass. The `handle_…` methods are aiosmtpd's hooks."""

    def __init__(self, pool: db.Pool, doorbell: Doorbell, settings: Settings, limits: Limits) -> None:
        assert settings.bounce_domain is not None
        self.limits = limits
        self.domain = settings.bounce_domain.lower()
        self.tls: ssl.SSLContext | None = None
        if settings.ssl_certfile:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
        self._pool = pool
        self._doorbell = doorbell
        self._sessions: dict[_Session, str] = {}
        self._peers: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        self._closing = False
        self._allowance_bytes = float(limits.bytes_an_hour)
        self._allowed_at = time.monotonic()

    def session(self) -> _Session:
        return _Session(self)

    def admit(self, session: _Session, peer: str) -> bool:
        """Whether there is room for one more session, and one of this peer."""
        if len(self._sessions) >= self.limits.connections or self._peers[peer] >= self.limits.connections_a_peer:
            BOUNCES_RECEIVED.labels("crowded").inc()
            return False
        self._sessions[session] = peer
        self._peers[peer] += 1
        self._empty.clear()
        return not self._closing

    def dismiss(self, session: _Session) -> None:
        if peer := self._sessions.pop(session, None):
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]
        if not self._sessions:
            self._empty.set()

    async def close(self, within: timedelta) -> None:
        """End the sessions that wait for a command at once, and the others after the answer to their mail."""
        self._closing = True
        for session in [*self._sessions]:
            session.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(within.total_seconds()):
                await self._empty.wait()
        for session in [*self._sessions]:
            session.abort()

    async def handle_EHLO(  # noqa: N802
        self, _server: SMTP, session: Session, _envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        return [*responses[:-1], "250-PIPELINING", "250-ENHANCEDSTATUSCODES", responses[-1]]

    async def handle_RCPT(  # noqa: N802
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: Sequence[str]
    ) -> str:
        address = address.lower()
        if address == "postmaster":
            address = f"postmaster@{self.domain}"
        local, _, domain = address.rpartition("@")
        if domain != self.domain or not (local in MAILBOXES or dsn.verp_attempt(address)):
            BOUNCES_RECEIVED.labels("refused").inc()
            return "550 5.1.1 No such mailbox: bounces and feedback reports are taken here, and nothing is relayed"
        if len(envelope.rcpt_tos) >= self.limits.recipients:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Store the mail once for each recipient, commit, and only then say that it was taken."""
        content = envelope.content
        assert isinstance(content, bytes)
        if len(content) * len(envelope.rcpt_tos) > self._allowance():
            BOUNCES_RECEIVED.labels("crowded").inc()
            log.warning("bounces.too_many", limit_bytes_an_hour=self.limits.bytes_an_hour)
            return "452 4.3.1 Too much mail at the moment; try again later"
        now, peer = datetime.now(UTC), _peer(session.peer)
        items = [
            (dsn.event_id(recipient, content), dsn.pack(dsn.Envelope(recipient, peer, now), content))
            for recipient in dict.fromkeys(envelope.rcpt_tos)
        ]
        try:
            new = await receipts.receive(self._pool, dsn.PROVIDER, items)
        except DatabaseUnavailable as error:
            BOUNCES_RECEIVED.labels("unavailable").inc()
            log.warning("database.unavailable", operation="bounce", reason=type(error.__cause__).__name__)
            return "451 4.3.0 Cannot be stored at the moment; try again later"
        self._allowance_bytes -= len(content) * new
        BOUNCES_RECEIVED.labels("stored").inc(new)
        BOUNCES_RECEIVED.labels("known").inc(len(items) - new)
        log.info("bounces.received", new=new, known=len(items) - new, size_bytes=len(content))
        if new:
            self._doorbell.ring()
        return "250 2.0.0 Ok: stored"

    async def handle_exception(self, error: Exception) -> str:
        """A fault of ours must lose no mail, so it is never a 5xx."""
        log.error("bounces.failed", exc_info=error)
        return "451 4.3.0 Local error; try again later"

    def _allowance(self) -> float:
        """How many bytes may be stored now: at most those of an hour, and they come back evenly."""
        now, most = time.monotonic(), self.limits.bytes_an_hour
        self._allowance_bytes = min(most, self._allowance_bytes + (now - self._allowed_at) * most / 3600)
        self._allowed_at = now
        return self._allowance_bytes


class _Session(SMTP):
    """One connection."""

    line_length_limit = 16 << 10  # of the reader's buffer; a longer line of a mail comes in pieces

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._limits = listener.limits
        self._lifetime: asyncio.TimerHandle | None = None
        self._taking = False
        self._leaving = False
        super().__init__(
            listener,
            data_size_limit=self._limits.mail_bytes,
            enable_SMTPUTF8=True,
            hostname=listener.domain,
            ident="ESMTP",
            tls_context=listener.tls,
            timeout=self._limits.idle.total_seconds(),
            command_call_limit=COMMANDS,
            loop=asyncio.get_running_loop(),
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.transport is None:  # else STARTTLS makes it a second time
            if not self._listener.admit(self, _peer(transport.get_extra_info("peername"))):
                hang_up(transport, "421 4.7.0 Too many connections; try again later")
                return
            self._lifetime = self.loop.call_later(self._limits.session.total_seconds(), self._timeout_cb)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.dismiss(self)
        if self._lifetime is not None:
            self._lifetime.cancel()
            super().connection_lost(error)

    def leave(self) -> None:
        """End the session as soon as no mail is under way in it."""
        self._leaving = True
        if not self._taking and self.transport is not None:
            hang_up(self.transport, "421 4.3.2 Shutting down; try again in a moment")

    def abort(self) -> None:
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()

    def _timeout_cb(self) -> None:
        if self.transport is not None:
            hang_up(self.transport, "421 4.4.2 Too slow")

    async def _handle_client(self) -> None:
        with suppress(ConnectionError):  # the client's end is nothing to report
            await super()._handle_client()

    def _getaddr(self, arg: str) -> tuple[str | None, str | None]:
        """A path (RFC 5321 4.1.2) and what follows. aiosmtpd's own asks a parser of headers, which breaks on some."""
        match = _PATH.fullmatch(arg)
        return (match[1] or "<>", match[2]) if match else (None, None)

    async def smtp_VRFY(self, _arg: str | None) -> None:  # noqa: N802
        await self.push("252 2.1.5 Send some mail")

    async def smtp_DATA(self, arg: str | None) -> None:  # noqa: N802
        """RFC 5321 4.1.1.4, in the memory of one mail at most."""
        assert self.envelope is not None
        assert self.session is not None
        if arg:
            await self.push("501 5.5.4 DATA has no parameters")
            return
        if not self.envelope.rcpt_tos:
            await self.push("503 5.5.1 RCPT first")
            return
        self._taking = True
        try:
            await self.push("354 End with a line that holds a dot")
            self.envelope.content = await self._content()
            if self.envelope.content is None:
                BOUNCES_RECEIVED.labels("too_big").inc()
                await self.push(f"552 5.3.4 More than {self._limits.mail_bytes} bytes")
            else:
                await self.push(await self._listener.handle_DATA(self, self.session, self.envelope))
        finally:
            self._set_post_data_state()  # type: ignore[no-untyped-call]
            self._taking = False
        if self._leaving:
            self.leave()

    async def _content(self) -> bytes | None:
        """The mail without the dots of the transfer; None if it is too big. Only CRLF.CRLF ends it."""
        content, size = bytearray(b"\r\n"), 0
        most = self._limits.mail_bytes + len(b".\r\n")
        while not content.endswith(b"\r\n.\r\n"):
            try:
                piece = await self._reader.readuntil(b".\r\n")
            except asyncio.LimitOverrunError as error:
                piece = await self._reader.read(error.consumed)
            content += piece
            size += len(piece)
            if size > most:
                del content[:-5]  # what tells the end
        return bytes(content[:-3]).replace(b"\r\n.", b"\r\n")[2:] if size <= most else None


def hang_up(transport: asyncio.BaseTransport, answer: str) -> None:
    """Close, with a last answer; if nobody reads it, after LINGER all the same."""
    assert isinstance(transport, asyncio.Transport)
    if not transport.is_closing():
        transport.write(f"{answer}\r\n".encode())
        transport.close()
        asyncio.get_running_loop().call_later(LINGER.total_seconds(), transport.abort)


def _peer(name: Any) -> str:
    """The IP address of a socket's other end, IPv4 as such on a socket of both."""
    return str(name[0]).removeprefix("::ffff:") if name else "unknown"
