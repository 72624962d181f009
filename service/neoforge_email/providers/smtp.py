"""SMTP (RFC 5321): kept connections, and windows of messages pipelined over them (RFC 2920).

The body of a message and the commands of the next one go out in one write, so a message costs one round trip. What
became of each recipient follows from the reply codes; what was lost without an answer is uncertain only from the moment
the end of the body may have reached the server.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from neoforge_email import mime
from neoforge_email.dkim import Signer
from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Message
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope
from neoforge_email.providers.wire import Broken, Reply, Wire

IDLE_MOST = timedelta(seconds=45)  # servers close idle connections after a minute or more
USES_MOST = 500  # messages a connection, so that load follows a server's changes
LARGE = 64 * 1024  # octets; a body above is handed over before its end is written


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A message ready to go: its commands (MAIL, RCPT…, DATA) and its dot-stuffed body without the final dot."""

    commands: tuple[bytes, ...]
    body: bytes


class SmtpProvider:
    """Delivers through one SMTP server. Raises ValueError for settings that cannot work."""

    name = "smtp"

    def __init__(
        self,
        server: str,
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
        signer: Signer | None = None,
    ) -> None:
        self.window = window
        self.connections = connections
        self.timeout = timeout
        self._server = server
        self._port = port
        self._username = username
        self._password = password
        self._starttls = use_tls
        self._tls = ssl.create_default_context(cafile=ca_file) if use_tls or use_ssl else None
        if username and not self._tls and not _is_loopback(server):
            raise ValueError("SMTP_USERNAME: a password is never sent in the clear; set SMTP_USE_TLS or SMTP_USE_SSL")
        self._signer = signer
        self._idle: list[SmtpConnection] = []
        self._closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[SmtpConnection]:
        """A kept connection or a new one. Raises ProviderUnavailable."""
        connection = self._kept() or await self._connect()
        try:
            yield connection
        except BaseException:
            connection.wire.abort()
            raise
        if connection.usable and not self._closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.wire.quit()

    async def close(self) -> None:
        """Close the kept connections; those in use are closed when they are given back."""
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.wire.quit()

    def _kept(self) -> SmtpConnection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since + IDLE_MOST.total_seconds() > now:
                return connection
            connection.wire.quit()
        return None

    async def _connect(self) -> SmtpConnection:
        loop = asyncio.get_running_loop()
        wire: Wire | None = None
        try:
            async with asyncio.timeout(self.timeout.total_seconds()):
                at_once = None if self._starttls else self._tls
                _, wire = await loop.create_connection(Wire, self._server, self._port, ssl=at_once)
                connection = SmtpConnection(wire, self.timeout.total_seconds(), self._signer)
                await connection.greet()
                if self._starttls and self._tls:
                    await connection.start_tls(self._tls, self._server)
                if self._username and self._password:
                    await connection.authenticate(self._username, self._password)
                return connection
        except (Broken, OSError, TimeoutError, ssl.SSLError, ssl.CertificateError) as error:
            if wire is not None:
                wire.abort()
            why = error.why if isinstance(error, Broken) else str(error) or "no answer in time"
            raise ProviderUnavailable(f"The SMTP server {self._server}:{self._port} cannot be used: {why}") from None
        except BaseException:
            if wire is not None:
                wire.abort()
            raise


@dataclass(eq=False, slots=True)
class SmtpConnection:
    """One session. `usable` says that another window may be sent on it."""

    wire: Wire
    timeout_seconds: float
    signer: Signer | None
    extensions: dict[str, str] = field(default_factory=dict)
    uses: int = 0
    idle_since: float = 0.0
    between: bool = True

    @property
    def usable(self) -> bool:
        return self.between and self.wire.quiet and self.uses < USES_MOST

    # --- opening ---------------------------------------------------------------------------------------------------

    async def greet(self) -> None:
        greeting = await self.wire.reply(self._deadline())
        if greeting.code != 220:
            raise Broken(f"it answered {greeting.text}")
        await self._hello()

    async def _hello(self) -> None:
        name = socket.gethostname().encode("ascii", "ignore") or b"localhost"
        reply = await self._ask(b"EHLO " + name)
        if reply.code == 250:
            words = [line.decode("ascii", "replace").upper().split(" ", 1) for line in reply.lines[1:]]
            self.extensions = {word[0]: word[1] if len(word) > 1 else "" for word in words}
            return
        reply = await self._ask(b"HELO " + name)
        if reply.code != 250:
            raise Broken(f"it answered HELO with {reply.text}")
        self.extensions = {}

    async def start_tls(self, context: ssl.SSLContext, server: str) -> None:
        """Encrypt (RFC 3207), or fail: never go on in the clear. What was said before is forgotten."""
        if "STARTTLS" not in self.extensions:
            raise Broken("it does not offer STARTTLS, and SMTP_USE_TLS asks for it")
        reply = await self._ask(b"STARTTLS")
        if reply.code != 220:
            raise Broken(f"it answered STARTTLS with {reply.text}")
        if not self.wire.quiet:
            raise Broken("it wrote in the clear after agreeing to STARTTLS")
        loop = asyncio.get_running_loop()
        transport = await loop.start_tls(self.wire.transport, self.wire, context, server_hostname=server)
        if transport is None:
            raise Broken("the connection was lost during STARTTLS")
        self.wire.use(transport)
        await self._hello()

    async def authenticate(self, username: str, password: str) -> None:
        """AUTH PLAIN (RFC 4616), else LOGIN. No reply text goes on: servers may repeat what they were sent."""
        offered = self.extensions.get("AUTH", "").split()
        if "PLAIN" in offered:
            reply = await self._ask(b"AUTH PLAIN " + base64.b64encode(f"\0{username}\0{password}".encode()))
        elif "LOGIN" in offered:
            reply = await self._ask(b"AUTH LOGIN")
            for word in (username, password):
                if reply.code == 334:
                    reply = await self._ask(base64.b64encode(word.encode()))
        else:
            raise Broken("it offers neither AUTH PLAIN nor AUTH LOGIN, and SMTP_USERNAME is set")
        if reply.code != 235:
            raise Broken(f"it refused SMTP_USERNAME and SMTP_PASSWORD ({reply.code})")

    # --- sending ---------------------------------------------------------------------------------------------------

    async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        """As `Connection.send` promises: a tuple a message, with a result per open recipient."""
        try:
            return await self._send(window, may_start)
        except BaseException:
            self.wire.abort()
            raise

    async def _send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        results: list[tuple[Result, ...]] = []
        written: _Prepared | None = None  # the next message, whose commands are under way already
        for index, message in enumerate(window):
            prepared = written or self._prepare(message)
            if isinstance(prepared, Result):
                results.append((prepared,) * len(message.open_recipients))
                continue
            ahead = window[index + 1] if index + 1 < len(window) else None
            if self.wire.lost is not None or not self.between or (written is None and not may_start()):
                results.append((NOT_STARTED,) * len(message.open_recipients))
                written = None
                continue
            outcome, written = await self._send_one(message, prepared, written is not None, ahead, may_start)
            results.append(outcome)
        return results

    async def _send_one(
        self,
        message: Message,
        prepared: _Prepared,
        is_written: bool,
        ahead: Message | None,
        may_start: Callable[[], bool],
    ) -> tuple[tuple[Result, ...], _Prepared | None]:
        """Send one message; with its body may go the commands of the one `ahead`, which is then returned prepared."""
        count = len(message.open_recipients)
        self.between = False
        self.uses += 1
        try:
            replies = await self._envelope(prepared, is_written)
        except Broken as broken:
            self.wire.abort()
            return (Result(Outcome.DEFERRED, Scope.CONNECTION, broken.why),) * count, None
        closing = next((reply for reply in replies if reply.code == 421), None)
        if closing:
            self.wire.abort()
            return (Result(Outcome.DEFERRED, Scope.CONNECTION, closing.text),) * count, None
        verdicts = _verdicts(replies, count)
        data = replies[-1] if len(replies) == count + 2 else None
        if data is None or data.code != 354:
            return await self._abandon(verdicts), None
        return await self._body(prepared, verdicts, ahead, may_start)

    async def _envelope(self, prepared: _Prepared, is_written: bool) -> list[Reply]:
        """MAIL, RCPT… and DATA: all at once where the server pipelines; else one by one, and no further than it makes sense."""
        replies: list[Reply] = []
        if self._pipelines:
            if not is_written:
                self.wire.write(b"".join(prepared.commands))
            return [await self.wire.reply(self._deadline()) for _ in prepared.commands]
        for command in prepared.commands:
            if command == DATA and not any(_positive(reply) for reply in replies[1:]):
                break
            replies.append(await self._ask(command.removesuffix(b"\r\n")))
            if not _positive(replies[0]) or replies[-1].code == 421:
                break
        return replies

    async def _abandon(self, verdicts: list[Result | None]) -> tuple[Result, ...]:
        """No body is wanted: end the transaction, so that the connection can carry the next one."""
        try:
            reply = await self._ask(b"RSET")
            self.between = reply.code == 250
        except Broken:
            self.wire.abort()
        return tuple(verdict or UNDECIDED for verdict in verdicts)

    async def _body(
        self, prepared: _Prepared, verdicts: list[Result | None], ahead: Message | None, may_start: Callable[[], bool]
    ) -> tuple[tuple[Result, ...], _Prepared | None]:
        wanted = any(verdict is None for verdict in verdicts)
        if wanted and not may_start():
            # The server waits for a body: only closing the connection takes the message back.
            self.wire.abort()
            return tuple(verdict or NOT_STARTED for verdict in verdicts), None
        deadline = self._deadline()
        following = self._prepare(ahead) if ahead is not None and self._pipelines and may_start() else None
        next_prepared = following if isinstance(following, _Prepared) else None
        commands = b"".join(next_prepared.commands) if next_prepared else b""
        body = prepared.body if wanted else b""
        try:
            if len(body) > LARGE:
                self.wire.write(body)
                await self.wire.drain(deadline)
                body = b""
        except Broken as broken:
            self.wire.abort()
            return tuple(
                verdict or Result(Outcome.DEFERRED, Scope.CONNECTION, broken.why) for verdict in verdicts
            ), None
        try:
            self.wire.write(body + b".\r\n" + commands)
            reply = await self.wire.reply(deadline)
        except Broken as broken:
            self.wire.abort()
            return tuple(verdict or Result(Outcome.UNCERTAIN, Scope.MESSAGE, broken.why) for verdict in verdicts), None
        if reply.code == 421:
            self.wire.abort()
            next_prepared = None
        self.between = True
        final = _result(reply, Scope.MESSAGE) or Result(Outcome.TAKEN, Scope.MESSAGE, reply.text)
        return tuple(verdict or final for verdict in verdicts), next_prepared

    # --- small -----------------------------------------------------------------------------------------------------

    def _prepare(self, message: Message) -> _Prepared | Result:
        try:
            content = mime.build(message, self.signer)
        except ValueError as error:
            return Result(Outcome.REFUSED, Scope.MESSAGE, f"the message cannot be built: {error}"[:500])
        if b"\n." in content or content.startswith(b"."):
            content = (b"\n" + content).replace(b"\n.", b"\n..")[1:]
        return _Prepared(
            (
                b"MAIL FROM:<%b>\r\n" % message.sender.address.encode(),
                *(b"RCPT TO:<%b>\r\n" % recipient.mailbox.address.encode() for recipient in message.open_recipients),
                DATA,
            ),
            content,
        )

    @property
    def _pipelines(self) -> bool:
        return "PIPELINING" in self.extensions

    async def _ask(self, command: bytes) -> Reply:
        self.wire.write(command + b"\r\n")
        return await self.wire.reply(self._deadline())

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout_seconds


DATA = b"DATA\r\n"

UNDECIDED = Result(Outcome.DEFERRED, Scope.MESSAGE, "the server accepted the recipient and then wanted no message")


def _verdicts(replies: Sequence[Reply], count: int) -> list[Result | None]:
    """What the replies to MAIL, RCPT… and DATA settle for each recipient; None where the body decides."""
    refusal = _result(replies[0], Scope.MESSAGE)
    if refusal:
        return [refusal] * count
    verdicts = [_result(reply, Scope.RECIPIENT) for reply in replies[1 : count + 1]]
    data = replies[count + 1] if len(replies) > count + 1 else None
    if data is not None and data.code != 354:
        refusal = _result(data, Scope.MESSAGE)
        return [verdict or refusal for verdict in verdicts]
    return verdicts


def _result(reply: Reply, scope: Scope) -> Result | None:
    """A refusal by its code: 4xx may be tried again, 5xx not, 421 is the server's own trouble. None for a success."""
    if reply.code == 421:
        return Result(Outcome.DEFERRED, Scope.CONNECTION, reply.text)
    if 400 <= reply.code < 500:
        return Result(Outcome.DEFERRED, scope, reply.text)
    if reply.code >= 500:
        return Result(Outcome.REFUSED, scope, reply.text)
    return None


def _positive(reply: Reply) -> bool:
    return 200 <= reply.code < 300


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server).is_loopback
    except ValueError:
        return server == "localhost"
