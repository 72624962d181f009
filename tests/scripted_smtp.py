"""An SMTP server that does what a test tells it to: refuse, defer, fall silent, break off, or talk nonsense."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Drop:
    """Reset the connection instead of answering."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Do not answer, and keep the connection open."""


Action = str | bytes | Drop | Silence
"""What is done about a command: text is a reply, bytes are written as they are."""

DROP, SILENCE = Drop(), Silence()
PIPELINING = ("PIPELINING", "8BITMIME")


@dataclass
class ScriptedServer:
    """`script` maps a regular expression to an action, or to several for one time after another; the last one stays.

    It is matched with a whole command, with `GREETING`, with `BODY` (after 354, when the body has begun) and with `.`
    (when the body is complete). What it does not name is answered as a friendly server does.
    """

    script: Mapping[str, Action | Sequence[Action]] = field(default_factory=dict)
    offers: tuple[str, ...] = PIPELINING
    tls: ssl.SSLContext | None = None
    dribble: bool = False
    port: int = 0
    connections: int = 0
    commands: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    _used: dict[str, int] = field(default_factory=dict)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            if await self._do(reader, writer, "GREETING", "220 scripted.example ESMTP"):
                while line := await reader.readline():
                    if not await self._command(reader, writer, line.decode().removesuffix("\r\n")):
                        break
        writer.close()

    async def hang_up(self) -> None:
        """Close what is open, as servers do after a while, politely."""
        for writer in self._writers:
            with suppress(OSError):
                writer.write(b"421 4.4.2 idle for too long\r\n")
                writer.close()
        self._writers.clear()
        await asyncio.sleep(0.05)

    async def _command(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str) -> bool:
        self.commands.append(command)
        self.encrypted.append(writer.get_extra_info("ssl_object") is not None)
        verb = command.upper().split(" ")[0]
        if verb == "EHLO":
            friendly = "\r\n".join(f"250-{line}" for line in ("scripted.example", *self.offers)) + "\r\n250 HELP"
        else:
            friendly = {"DATA": "354 go on", "QUIT": "221 bye", "STARTTLS": "220 go on", "AUTH": "235 welcome"}.get(
                verb, "250 ok"
            )
        answer = await self._do(reader, writer, command, friendly)
        if verb == "STARTTLS" and answer.startswith("220") and self.tls:
            await self._start_tls(writer)
        if verb == "DATA" and answer.startswith("354"):
            return await self._body(reader, writer)
        return bool(answer) and verb != "QUIT"

    async def _start_tls(self, writer: asyncio.StreamWriter) -> None:
        assert self.tls is not None
        clear = writer.transport
        try:
            await writer.start_tls(self.tls)
        finally:
            if writer.transport is None:  # where the client broke off, Python 3.11 leaves it unset
                writer._transport = clear

    async def _body(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if isinstance(self._action("BODY"), Drop):
            await reader.read(10)
            writer.transport.abort()
            return False
        lines = []
        while (line := await reader.readline()) != b".\r\n":
            if not line:
                return False
            lines.append(line.removeprefix(b"."))
        self.bodies.append(b"".join(lines))
        return bool(await self._do(reader, writer, ".", "250 2.0.0 kept"))

    async def _do(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str, friendly: str) -> str:
        """Carry out the action; returns what was answered, or nothing where there is no more to be said."""
        action = self._action(what)
        if isinstance(action, Drop):
            writer.transport.abort()
            return ""
        if isinstance(action, Silence):
            while await reader.read(1024):
                pass
            return ""
        octets = action if isinstance(action, bytes) else f"{friendly if action is None else action}\r\n".encode()
        if not self.dribble:
            writer.write(octets)
        else:
            for octet in octets:
                writer.write(bytes([octet]))
                await writer.drain()
                await asyncio.sleep(0)
        await writer.drain()
        return octets.decode("latin-1")

    def _action(self, what: str) -> Action | None:
        for pattern, actions in self.script.items():
            if re.fullmatch(pattern, what):
                if isinstance(actions, str | bytes | Drop | Silence):
                    return actions
                number = self._used.get(pattern, 0)
                self._used[pattern] = number + 1
                return actions[min(number, len(actions) - 1)]
        return None


@asynccontextmanager
async def scripted_server(
    script: Mapping[str, Action | Sequence[Action]] | None = None,
    *,
    offers: tuple[str, ...] = PIPELINING,
    tls: ssl.SSLContext | None = None,
    implicit_tls: bool = False,
    dribble: bool = False,
) -> AsyncIterator[ScriptedServer]:
    """Listen on the loopback interface while the context lasts."""
    scripted = ScriptedServer(script or {}, offers, tls, dribble)
    server = await asyncio.start_server(scripted.session, "127.0.0.1", 0, ssl=tls if implicit_tls else None)
    scripted.port = server.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        server.close()
        for writer in scripted._writers:
            writer.transport.abort()
        await asyncio.sleep(0)
