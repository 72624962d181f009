"""An HTTP server that does what a test tells it to: answer anything, fall silent, break off, or talk nonsense."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.scripted_smtp import Drop, Silence


@dataclass(frozen=True, slots=True)
class Answer:
    """`body` is written as JSON unless it is bytes already; `then` follows the answer."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    then: Drop | None = None


@dataclass(frozen=True, slots=True)
class Trickle:
    """An answer that never ends: a header a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Half:
    """Reset the connection when half of the body has come."""


HALF = Half()


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Action = Answer | bytes | Drop | Half | Silence | Trickle
"""What is done about a request; bytes are written as they are, and the connection is closed."""

Step = Action | Callable[[Request], Action]


@dataclass
class ScriptedHttp:
    """`script` is done one action a request, and its last one for all that follow; `requests` have come whole."""

    script: Sequence[Step]
    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _begun: int = 0

    async def session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and what is done about it; whether the connection is kept."""
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
        octets = int(headers.get("content-length", "0"))
        step = self.script[min(self._begun, len(self.script) - 1)]
        self._begun += 1
        if isinstance(step, Half):
            await reader.readexactly(octets // 2)
            writer.transport.abort()
            return False
        request = Request(method, path, headers, await reader.readexactly(octets))
        self.requests.append(request)
        return await self._do(step(request) if callable(step) else step, reader, writer)

    async def _do(self, action: Action, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        match action:
            case Drop():
                writer.transport.abort()
            case Silence():
                while await reader.read(1024):
                    pass
            case Trickle():
                writer.write(b"HTTP/1.1 200 OK\r\n")
                while not writer.transport.is_closing():
                    writer.write(b"X-Wait: a little\r\n")
                    await asyncio.sleep(0.1)
            case bytes():
                writer.write(action)
                await writer.drain()
            case Answer():
                body = action.body if isinstance(action.body, bytes) else json.dumps(action.body).encode()
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **action.headers}
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                writer.write(f"HTTP/1.1 {action.status} Whatever\r\n{lines}\r\n".encode() + body)
                await writer.drain()
                return action.then is None
        return False


@asynccontextmanager
async def scripted_http(*script: Step, tls: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedHttp]:
    """Listen on the loopback interface while the context lasts."""
    scripted = ScriptedHttp(script or (Answer(),))
    server = await asyncio.start_server(scripted.session, "127.0.0.1", 0, ssl=tls, limit=2**26)
    scripted.port = server.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        server.close()
        for writer in scripted.writers:
            writer.transport.abort()
        await asyncio.sleep(0)
