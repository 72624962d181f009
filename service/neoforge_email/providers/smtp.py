"""SMTP (RFC 5321) over kept connections, with PIPELINING (RFC 2920) where the server offers it."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

from neoforge_email import mime
from neoforge_email.dkim import Signer
from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Message
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope, windows
from neoforge_email.providers.wire import Broken, Reply, Wire

MESSAGES_PER_CONNECTION = 500
IDLE = timedelta(seconds=60)
PROBE_AFTER = timedelta(seconds=5)  # idle for longer than this, a connection is asked whether it still lives

_SMALL_BODY = 64 * 1024  # octets; goes out in one write with its final dot and the next message's commands


class SmtpProvider:
    """One server; see `base.Provider`. `use_tls` is STARTTLS, `use_ssl` TLS from the first byte; neither is ever skipped.

    `ca_file` replaces the system's CAs. With `bounce_domain` each attempt has a return path of its own there (VERP), so
    that a bounce names it; without, it is the sender. ValueError if the settings do not go together.
    """

    name = "smtp"
    reports = False

    def __init__(
        self,
        host: str,
        port: int,
        *,
        username: str | None = None,
        password: str | None = None,
        use_tls: bool = True,
        use_ssl: bool = False,
        ca_file: Path | None = None,
        timeout: timedelta = timedelta(seconds=30),
        connections: int = 8,
        window: int = 10,
        bounce_domain: str | None = None,
        signer: Signer | None = None,
        idle: timedelta = IDLE,
        messages_per_connection: int = MESSAGES_PER_CONNECTION,
    ) -> None:
        if use_tls and use_ssl:
            raise ValueError("choose SMTP_USE_TLS (STARTTLS) or SMTP_USE_SSL, not both")
        self.window = window
        self.connections = connections
        self.timeout = timeout
        self._host = host
        self._port = port
        self._username = username or ""
        self._password = password or ""
        self._use_ssl = use_ssl
        self._context = _verified(ca_file) if use_tls or use_ssl else None
        self._bounce_domain = bounce_domain
        self._signer = signer
        self._idle = idle.total_seconds()
        self._messages_per_connection = messages_per_connection
        self._slots = asyncio.Semaphore(connections)
        self._kept: list[SmtpConnection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def calls(self, messages: Sequence[Message]) -> list[list[Message]]:
        return windows(messages, self.window)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[SmtpConnection]:
        """See `base.Provider.connection`; waits while all connections are in use."""
        async with self._slots:
            connection = await self._take_kept() or await self._connect()
            try:
                yield connection
            finally:
                self._give_back(connection)

    async def _take_kept(self) -> SmtpConnection | None:
        if self._kept:
            await asyncio.sleep(0)  # lets the loop notice what the server closed in the meantime
        while self._kept:
            connection = self._kept.pop()
            connection.cancel_expiry()
            if await connection.answers():
                return connection
            self._let_go(connection)
        return None

    def _give_back(self, connection: SmtpConnection) -> None:
        if self._is_closed or not connection.wire.quiet or connection.messages >= self._messages_per_connection:
            self._let_go(connection)
        else:
            self._kept.append(connection)
            connection.expire_in(self._idle, self._expire)

    def _expire(self, connection: SmtpConnection) -> None:
        if connection in self._kept:
            self._kept.remove(connection)
            self._let_go(connection)

    def _let_go(self, connection: SmtpConnection) -> None:
        connection.wire.quit()
        task = asyncio.ensure_future(connection.wire.closed(within=1))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """See `base.Provider.close`; waits a second at most for the goodbyes."""
        self._is_closed = True
        while self._kept:
            connection = self._kept.pop()
            connection.cancel_expiry()
            self._let_go(connection)
        if self._closing:
            await asyncio.wait(self._closing)

    async def _connect(self) -> SmtpConnection:
        where = f"{self._host}:{self._port}"
        seconds = self.timeout.total_seconds()
        wire = Wire()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().create_connection(
                    lambda: wire, self._host, self._port, ssl=self._context if self._use_ssl else None
                )
            connection = SmtpConnection(wire, seconds, self._signer, self._bounce_domain)
            await self._greet(connection)
        except BaseException as error:
            wire.abort()
            if isinstance(error, ssl.SSLError):
                raise ProviderUnavailable(f"TLS with the SMTP server {where} failed: {_words(error)}") from None
            if isinstance(error, TimeoutError):
                raise ProviderUnavailable(f"the SMTP server {where} did not answer within {seconds:g} s") from None
            if isinstance(error, OSError):
                raise ProviderUnavailable(f"the SMTP server {where} cannot be reached: {_words(error)}") from None
            if isinstance(error, Broken):
                raise ProviderUnavailable(f"the SMTP server {where}: {self._without_secrets(error.why)}") from None
            raise
        return connection

    async def _greet(self, connection: SmtpConnection) -> None:
        wire = connection.wire
        await connection.expect("at the greeting", 220)
        await connection.hello()
        if self._context is not None and not self._use_ssl:
            if "STARTTLS" not in connection.capabilities:
                raise Broken("offers no STARTTLS, which SMTP_USE_TLS requires")
            wire.write(b"STARTTLS\r\n")
            await connection.expect("to STARTTLS", 220)
            if not wire.quiet:
                raise Broken("wrote something between STARTTLS and TLS, which could be an attack")  # CVE-2011-0411
            transport = await asyncio.get_running_loop().start_tls(
                wire.transport,
                wire,
                self._context,
                server_hostname=self._host,
                ssl_handshake_timeout=self.timeout.total_seconds(),
            )
            if transport is None:
                raise Broken("closed the connection during the TLS handshake")
            wire.use(transport)
            await connection.hello()
        if self._username:
            await self._log_in(connection)

    async def _log_in(self, connection: SmtpConnection) -> None:
        wire = connection.wire
        if self._context is None and not _is_loopback(wire.transport):
            raise Broken("a password is never sent without TLS: set SMTP_USE_TLS or SMTP_USE_SSL")
        offered = connection.capabilities.get("AUTH", "").upper().split()
        user, password = self._username.encode(), self._password.encode()
        if "PLAIN" in offered:
            wire.write(b"AUTH PLAIN " + b64encode(b"\0" + user + b"\0" + password) + b"\r\n")
        elif "LOGIN" in offered:
            wire.write(b"AUTH LOGIN\r\n")
            await connection.expect("to AUTH LOGIN", 334)
            wire.write(b64encode(user) + b"\r\n")
            await connection.expect("to the user name", 334)
            wire.write(b64encode(password) + b"\r\n")
        else:
            raise Broken(f"offers neither AUTH PLAIN nor LOGIN but {' '.join(offered) or 'no AUTH at all'}")
        await connection.expect("to SMTP_USERNAME and SMTP_PASSWORD", 235)

    def _without_secrets(self, text: str) -> str:
        """Some servers repeat the command that they refuse."""
        user, password = self._username.encode(), self._password.encode()
        plain = b64encode(b"\0" + user + b"\0" + password).decode()
        for secret in (plain, b64encode(password).decode(), self._password):
            if self._password:
                text = text.replace(secret, "***")
        return text


def _verified(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(f"SMTP_CA_FILE: {ca_file} holds no CA certificates in PEM form: {_words(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _words(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return error.strerror or str(error) or type(error).__name__


def _is_loopback(transport: asyncio.Transport) -> bool:
    peer = transport.get_extra_info("peername")
    return isinstance(peer, tuple) and ip_address(peer[0].partition("%")[0]).is_loopback


class _Job:
    """One message of a window on its way; `results` are filled in as they become known, in the order of `recipients`."""

    __slots__ = ("body", "dot_written", "recipients", "results", "sender", "with_reset")

    def __init__(self, message: Message, bounce_domain: str | None) -> None:
        self.sender = f"bounce+{message.attempt}@{bounce_domain}" if bounce_domain else message.sender.address
        self.recipients = [recipient.mailbox.address for recipient in message.open_recipients]
        self.results: list[Result | None] = [None] * len(self.recipients)
        self.body = b""
        self.with_reset = False
        self.dot_written = False

    @property
    def is_settled(self) -> bool:
        return None not in self.results

    def settle(self, result: Result) -> None:
        """For all recipients that have no result yet."""
        self.results = [result if old is None else old for old in self.results]


class SmtpConnection:
    """See `base.Connection`. `timeout_seconds` bounds the wait for each reply, and from a body's first octet to its answer."""

    def __init__(
        self, wire: Wire, timeout_seconds: float, signer: Signer | None = None, bounce_domain: str | None = None
    ) -> None:
        self.wire = wire
        self.capabilities: dict[str, str] = {}
        self.messages = 0
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout_seconds
        self._signer = signer
        self._bounce_domain = bounce_domain
        self._size_limit: int | None = None
        self._must_reset = False
        self._idle_since = self._loop.time()
        self._expiry: asyncio.TimerHandle | None = None

    # Before the first message.

    async def expect(self, when: str, code: int) -> Reply:
        """Broken if the next reply has another code."""
        reply = await self._reply()
        if reply.code != code:
            raise Broken(f"answered {when}: {reply.text}")
        return reply

    async def hello(self) -> None:
        """Say who we are and learn what the server can do; a server without EHLO can do nothing extra."""
        own = socket.gethostname()
        if not re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+", own):
            address = self.wire.transport.get_extra_info("sockname")[0].partition("%")[0]
            own = f"[IPv6:{address}]" if ":" in address else f"[{address}]"
        self.wire.write(f"EHLO {own}\r\n".encode())
        reply = await self._reply()
        self.capabilities = {}
        if reply.code == 250:
            for line in reply.lines[1:]:
                keyword, _, parameters = line.decode("ascii", "replace").replace("=", " ", 1).strip().partition(" ")
                name = keyword.upper()
                self.capabilities[name] = f"{self.capabilities.get(name, '')} {parameters}".strip()
            limit = self.capabilities.get("SIZE", "")
            self._size_limit = int(limit) if limit.isascii() and limit.isdigit() and int(limit) > 0 else None
        elif reply.code in {500, 501, 502, 504}:
            self.wire.write(f"HELO {own}\r\n".encode())
            await self.expect("to HELO", 250)
        else:
            raise Broken(f"answered to EHLO: {reply.text}")

    # While it is kept.

    async def answers(self) -> bool:
        """Whether the server still talks to us; asks it only after some seconds of silence."""
        if not self.wire.quiet:
            return False
        if self._loop.time() - self._idle_since < PROBE_AFTER.total_seconds():
            return True
        try:
            self.wire.write(b"NOOP\r\n")
            reply = await self.wire.reply(self._loop.time() + min(self._timeout, PROBE_AFTER.total_seconds()))
        except Broken:
            self.wire.abort()
            return False
        except BaseException:
            self.wire.abort()
            raise
        return reply.code == 250 and self.wire.quiet

    def expire_in(self, seconds: float, expire: Callable[[SmtpConnection], None]) -> None:
        self._idle_since = self._loop.time()
        self._expiry = self._loop.call_later(seconds, expire, self)

    def cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # Messages.

    async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        """See `base.Connection.send`."""
        jobs = [_Job(message, self._bounce_domain) for message in window]
        ready = self._ready(jobs, window)
        left = NOT_STARTED
        try:
            if not self.wire.quiet:
                raise Broken(self.wire.lost or "the server wrote something that nobody asked for")
            if "PIPELINING" in self.capabilities:
                await self._pipelined(ready, may_start)
            else:
                await self._step_by_step(ready, may_start)
        except Broken as broken:
            self.wire.abort()
            left = Result(Outcome.DEFERRED, Scope.CONNECTION, broken.why[:500])
        except BaseException:
            self.wire.abort()
            raise
        for job in jobs:
            if job.dot_written:
                job.settle(Result(Outcome.UNCERTAIN, Scope.MESSAGE, left.response))
            job.settle(left)
        return [tuple(result for result in job.results if result is not None) for job in jobs]

    def _ready(self, jobs: list[_Job], window: Sequence[Message]) -> Iterator[_Job]:
        """Jobs with their bodies, each made when it is asked for; those that cannot be sent at all are settled on the way."""
        for job, message in zip(jobs, window, strict=True):
            if job.is_settled:  # no open recipient
                continue
            try:
                body = mime.build(message, self._signer)
            except ValueError as error:
                job.settle(Result(Outcome.REFUSED, Scope.MESSAGE, f"cannot be written as mail: {error}"[:500]))
                continue
            if self._size_limit is not None and len(body) > self._size_limit:
                words = f"not sent: {len(body)} octets are more than the {self._size_limit} that the server takes"
                job.settle(Result(Outcome.REFUSED, Scope.MESSAGE, words))
                continue
            job.body = body.replace(b"\n.", b"\n..") if b"\n." in body else body
            yield job

    async def _pipelined(self, ready: Iterator[_Job], may_start: Callable[[], bool]) -> None:
        job = next(ready, None)
        if job is None or not may_start():
            return
        self.wire.write(self._commands(job))
        while job is not None:
            upcoming = next(ready, None)
            body_wanted = await self._answers_to_commands(job)
            if not may_start():
                if body_wanted:
                    raise Broken(NOT_STARTED.response)  # nothing but closing takes DATA back
                return
            ahead = b"" if upcoming is None else self._commands(upcoming)
            if body_wanted:
                await self._body(job, ahead)
            elif ahead:
                self.wire.write(ahead)
            job = upcoming

    def _commands(self, job: _Job) -> bytes:
        self.messages += 1
        job.with_reset, self._must_reset = self._must_reset, False
        size = f" SIZE={len(job.body)}" if "SIZE" in self.capabilities else ""
        receivers = "".join([f"RCPT TO:<{address}>\r\n" for address in job.recipients])
        reset = "RSET\r\n" if job.with_reset else ""
        return f"{reset}MAIL FROM:<{job.sender}>{size}\r\n{receivers}DATA\r\n".encode()

    async def _answers_to_commands(self, job: _Job) -> bool:
        """Whether the server waits for the body, or for a lone dot where all recipients were refused."""
        if job.with_reset:
            await self._reset_answer()
        sender = await self._answer(job, Scope.MESSAGE)
        for index in range(len(job.recipients)):
            answer = await self._answer(job, Scope.RECIPIENT)
            # Without a sender the server answers "503 MAIL first": no word about the recipient.
            job.results[index] = sender or answer
        reply = await self._reply(job)
        if reply.code == 354 and sender is None:
            return True
        self._must_reset = True
        if reply.code == 354:
            raise Broken("the server wants a body although it refused the sender")
        job.settle(_refusal(reply, Scope.MESSAGE))
        return False

    async def _step_by_step(self, ready: Iterator[_Job], may_start: Callable[[], bool]) -> None:
        for job in ready:
            if not may_start():
                return
            self.messages += 1
            if self._must_reset:
                self.wire.write(b"RSET\r\n")
                await self._reset_answer()
                self._must_reset = False
            size = f" SIZE={len(job.body)}" if "SIZE" in self.capabilities else ""
            self.wire.write(f"MAIL FROM:<{job.sender}>{size}\r\n".encode())
            refusal = await self._answer(job, Scope.MESSAGE)
            self._must_reset = True
            if refusal is not None:
                job.settle(refusal)
                continue
            for index, address in enumerate(job.recipients):
                self.wire.write(f"RCPT TO:<{address}>\r\n".encode())
                job.results[index] = await self._answer(job, Scope.RECIPIENT)
            if job.is_settled:
                continue
            self.wire.write(b"DATA\r\n")
            reply = await self._reply(job)
            if reply.code != 354:
                job.settle(_refusal(reply, Scope.MESSAGE))
                continue
            if not may_start():
                raise Broken(NOT_STARTED.response)
            await self._body(job)
            self._must_reset = False

    async def _reset_answer(self) -> None:
        reply = await self._reply()
        if reply.code != 250:
            raise Broken(f"the server answered to RSET: {reply.text}")

    async def _answer(self, job: _Job, scope: Scope) -> Result | None:
        """None for a yes, to MAIL or RCPT."""
        reply = await self._reply(job)
        return None if 200 <= reply.code < 300 else _refusal(reply, scope)

    async def _body(self, job: _Job, ahead: bytes = b"") -> None:
        """Write the body, its final dot and what follows in the same write, and learn what became of the message."""
        if not self.wire.quiet:
            raise Broken(self.wire.lost or "the server answered more than it was asked")
        deadline = self._loop.time() + self._timeout
        nobody = job.is_settled
        if nobody:  # RFC 2920 3.1: a lone dot ends a message that nobody gets
            self.wire.write(b".\r\n" + ahead)
        elif len(job.body) <= _SMALL_BODY:
            job.dot_written = True
            self.wire.write(b"".join((job.body, b".\r\n", ahead)))
        else:
            self.wire.write(job.body)
            await self.wire.drain(deadline)
            job.dot_written = True
            self.wire.write(b".\r\n" + ahead)
        reply = await self.wire.reply(deadline)
        if nobody:
            _raise_if_leaving(reply)
        elif 200 <= reply.code < 300:
            job.settle(Result(Outcome.TAKEN, Scope.MESSAGE, reply.text))
        elif reply.code >= 400:
            if reply.code == 421:
                job.settle(Result(Outcome.DEFERRED, Scope.CONNECTION, reply.text))
                _raise_if_leaving(reply)
            job.settle(_refusal(reply, Scope.MESSAGE))
        else:
            raise Broken(f"the server answered to a body: {reply.text}")

    async def _reply(self, job: _Job | None = None) -> Reply:
        """The next reply to a command; 421 breaks the connection."""
        reply = await self.wire.reply(self._loop.time() + self._timeout)
        if job is not None:
            _raise_if_leaving(reply)
        return reply


def _raise_if_leaving(reply: Reply) -> None:
    if reply.code == 421:
        raise Broken(reply.text)


def _refusal(reply: Reply, scope: Scope) -> Result:
    if reply.code < 400:
        raise Broken(f"the server answered out of turn: {reply.text}")
    return Result(Outcome.REFUSED if reply.code >= 500 else Outcome.DEFERRED, scope, reply.text)
