"""Lines to and replies from one SMTP server (RFC 5321 4.2): an asyncio protocol, for streams cost twice as much a message."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from dataclasses import dataclass
from typing import cast

MAX_LINE = 4096  # octets; RFC 5321 4.5.3.1.5 has 512, some servers write more
MAX_LINES = 128  # in one reply; EHLO needs some twenty
MAX_WAITING = 4096  # replies that nobody has read

_LINE = re.compile(rb"([2-5][0-9]{2})(?:([ -])(.*))?", re.DOTALL)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\s]+")


class Broken(Exception):
    """The connection cannot be used any more; `why` is for an operator."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, slots=True)
class Reply:
    code: int
    lines: tuple[bytes, ...]

    @property
    def text(self) -> str:
        """Code and words on one line of at most 500 characters."""
        words = b" ".join(self.lines).decode("utf-8", "replace")
        return _CONTROLS.sub(" ", f"{self.code} {words}").strip()[:500]


class Wire(asyncio.Protocol):
    """One connection. `lost` says why it ended, None while it is open."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pending = b""
        self._lines: list[bytes] = []
        self._replies: deque[Reply] = deque()
        self._reader: asyncio.Future[bool] | None = None
        self._writer: asyncio.Future[bool] | None = None
        self._paused = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.lost: str | None = None

    # From asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.use(cast(asyncio.Transport, transport))

    def use(self, transport: asyncio.Transport) -> None:
        """Write to `transport` from now on: the first one, or TLS over it."""
        self._transport = transport
        # Paused whenever anything is left unwritten, so that "not paused" means "all handed to the kernel". Under TLS, which
        # pauses at the limit, not above it, a limit of 0 would pause for good.
        transport.set_write_buffer_limits(high=0 if transport.get_extra_info("sslcontext") is None else 1)

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            return
        lines = (self._pending + data).split(b"\n")
        self._pending = lines.pop()
        try:
            for line in lines:
                self._line(line)
            if len(self._pending) > MAX_LINE:
                raise Broken("the server wrote a line without end")
        except Broken as broken:
            self._end(broken.why)
            self.abort()
            return
        if self._replies:
            self._wake()

    def _line(self, line: bytes) -> None:
        match = _LINE.fullmatch(line.rstrip(b"\r"))
        if match is None or len(line) > MAX_LINE:
            raise Broken(f"the server wrote something that is not SMTP: {line[:80]!r}")
        self._lines.append(match[3] or b"")
        if match[2] == b"-":
            if len(self._lines) > MAX_LINES:
                raise Broken("the server wrote a reply without end")
            return
        self._replies.append(Reply(int(match[1]), tuple(self._lines)))
        self._lines.clear()
        if len(self._replies) > MAX_WAITING:
            raise Broken("the server writes replies that nobody asked for")

    def eof_received(self) -> None:
        self._end("the server closed the connection")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(f"the connection was lost: {error}" if error else "the server closed the connection")
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(False)

    def _end(self, why: str) -> None:
        if self.lost is None:
            self.lost = why
        self._wake()
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(False)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(False)

    # For the client.

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None  # set by connection_made, before anyone has the wire
        return self._transport

    @property
    def quiet(self) -> bool:
        """Open, with nothing unread: at a point where no reply is due, anything else means that the two sides disagree."""
        return self.lost is None and not self._replies and not self._pending and not self._lines

    def write(self, data: bytes) -> None:
        if self.lost is not None:
            raise Broken(self.lost)
        self.transport.write(data)

    async def drain(self, deadline: float) -> None:
        """Until all is handed to the kernel, or Broken. Times are those of the loop's clock, in seconds."""
        while self._paused:
            self._writer = self._loop.create_future()
            await self._wait(self._writer, deadline, "the server does not read")
            self._writer = None
            if self.lost is not None:
                raise Broken(self.lost)

    async def reply(self, deadline: float) -> Reply:
        """The next reply; those that came before a connection was lost are still given."""
        while not self._replies:
            if self.lost is not None:
                raise Broken(self.lost)
            self._reader = self._loop.create_future()
            await self._wait(self._reader, deadline, "the server did not answer in time")
            self._reader = None
        return self._replies.popleft()

    async def _wait(self, event: asyncio.Future[bool], deadline: float, late: str) -> None:
        timer = self._loop.call_at(deadline, self._end_wait, event)
        try:
            if not await event:
                return
        finally:
            timer.cancel()
        raise Broken(late)

    @staticmethod
    def _end_wait(event: asyncio.Future[bool]) -> None:
        if not event.done():
            event.set_result(True)

    def abort(self) -> None:
        """Close at once; what is unwritten is thrown away."""
        self._end("closed by this side")
        if self._transport is not None:
            self._transport.abort()

    def quit(self) -> None:
        """Say goodbye and close without waiting for the answer."""
        if self.lost is None:
            self.transport.write(b"QUIT\r\n")
            self._end("closed by this side")
            self.transport.close()

    async def closed(self, within: float) -> None:
        """Until the connection is closed; after `within` seconds it is, whatever the server does."""
        done, _ = await asyncio.wait([self._closed], timeout=within)
        if not done:
            self.abort()
            await self._closed
