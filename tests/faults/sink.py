"""Where the laboratory's mail arrives: the mailbox's SMTP server with a journal, which misbehaves when it is told to.

    python -m tests.faults.sink --port 2525 --journal FILE --control FILE [--careful CERTIFICATE]

The control file holds `{"mode": MODE, "count": N}`: the next N messages meet that fault, or the listener is closed for N
tenths of a second. The journal tells the truth: what stands there was taken, whatever the client was told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from neoforge_email.mailbox import Session, Store

GARBAGE = b"\x00\xffthis is no SMTP\r\n"
BODY_FAULTS = {
    "silent-before": "no answer to a body, which is not taken",
    "silent-after": "no answer to a body that is taken",
    "garbage-before": "garbage for an answer to a body, which is not taken",
    "garbage-after": "garbage for an answer to a body that is taken",
    "drop-before": "the connection reset instead of an answer to a body, which is not taken",
    "drop-after": "the connection reset instead of an answer to a body that is taken",
    "drop-mid-body": "the connection reset in the middle of a body",
    "defer": "451 to a body",
    "leave": "421 to a body",
}
OTHER_FAULTS = {
    "close-at-data": "the connection closed at DATA, with all that came before it answered",
    "old": "all connections reset, then no EHLO",
    "closed": "nobody listens",
}


@dataclass
class Orders:
    """What is to go wrong next, and for how long."""

    mode: str = ""
    count: int = 0
    seen: bytes = b""
    sessions: set[Misbehaving] = field(default_factory=set)

    def take(self, *modes: str) -> str:
        """The mode that the next message meets, if it is one of these, or any where none are given."""
        if self.count <= 0 or (modes and self.mode not in modes):
            return ""
        self.count -= 1
        return self.mode


class Misbehaving(Session):
    """A session that looks at the orders. `careful` has STARTTLS, AUTH LOGIN and neither PIPELINING nor a first EHLO."""

    def __init__(self, store: Store, orders: Orders, careful: ssl.SSLContext | None) -> None:
        super().__init__(store)
        self._orders = orders
        self._careful = careful
        self._mute = False
        self._upgrade = False
        self._logging_in = 0
        self._task: asyncio.Task[None] | None = None
        self._early = b""  # came through TLS before the transport that answers it is known

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._orders.sessions.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._orders.sessions.discard(self)

    def abort(self) -> None:
        """Reset the connection: nothing that was not answered will be."""
        self._mute = True
        self._answers.clear()
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._mute:
            return
        if self._task is not None:
            self._early += data
            return
        super().data_received(data)
        if self._upgrade:
            self._upgrade = False
            self._task = asyncio.get_running_loop().create_task(self._start_tls())

    async def _start_tls(self) -> None:
        assert self._transport is not None
        with suppress(OSError, ConnectionError):
            transport = await asyncio.get_running_loop().start_tls(
                self._transport, self, self._careful or ssl.create_default_context(), server_side=True
            )
            assert isinstance(transport, asyncio.Transport)
            self._transport = transport
            self._task = None
            early, self._early = self._early, b""
            self.data_received(early)

    def _command(self) -> bool:
        return not self._mute and super()._command()

    def _answer(self, verb: bytes, rest: bytes) -> bytes:
        if verb == b"DATA" and self._orders.take("close-at-data"):
            self._close(b"")
            self._mute = True
            return b""
        if verb == b"EHLO" and self._orders.take("old"):
            return b"502 5.5.1 No such command\r\n"
        return super()._answer(verb, rest) if self._careful is None else self._careful_answer(verb, rest)

    def _careful_answer(self, verb: bytes, rest: bytes) -> bytes:
        secure = self._transport is not None and self._transport.get_extra_info("ssl_object") is not None
        if self._logging_in:
            self._logging_in -= 1
            return b"334 UGFzc3dvcmQ6\r\n" if self._logging_in else b"235 2.7.0 Welcome\r\n"
        match verb:
            case b"EHLO":
                self._reset()
                offer = b"AUTH LOGIN" if secure else b"STARTTLS"
                return b"250-careful.localhost\r\n250-ENHANCEDSTATUSCODES\r\n250 %s\r\n" % offer
            case b"STARTTLS":
                self._upgrade = True
                return b"220 2.0.0 Go on\r\n"
            case b"AUTH":
                self._logging_in = 2
                return b"334 VXNlcm5hbWU6\r\n"
        return super()._answer(verb, rest)

    def _body(self) -> bool:
        if self._mute:
            return False
        if self._orders.take("drop-mid-body"):
            self.abort()
            return False
        return super()._body()

    def _keep(self, content: bytes) -> bytes:
        mode = self._orders.take(*BODY_FAULTS)
        if mode == "defer":
            return b"451 4.3.0 Later\r\n"
        if mode == "leave":
            return b"421 4.3.0 Leaving\r\n"
        answer = super()._keep(content) if not mode or mode.endswith("-after") else b""
        if mode.startswith("silent"):
            self._mute = True
            return b""
        if mode.startswith("drop"):
            self.abort()
            return b""
        return GARBAGE if mode else answer


async def follow(
    orders: Orders, control: Path, stopped: asyncio.Event, on_change: Callable[[], Awaitable[None]]
) -> None:
    """Read the control file whenever it changes, until stopped."""
    while not stopped.is_set():
        text = control.read_bytes() if control.exists() else b""
        if text and text != orders.seen:
            orders.seen = text
            order = json.loads(text)
            orders.mode, orders.count = order["mode"], order["count"]
            await on_change()
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), 0.02)


async def run(port: int, journal: Path, control: Path, careful: ssl.SSLContext | None) -> None:
    store = Store(keep=1, journal=journal)
    orders = Orders()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)

    async def listen() -> asyncio.Server:
        return await loop.create_server(lambda: Misbehaving(store, orders, careful), "127.0.0.1", port, backlog=1024)

    server = await listen()

    async def hang_up() -> None:
        nonlocal server
        if orders.mode not in {"closed", "old"}:
            return
        for session in list(orders.sessions):
            session.abort()
        if orders.mode == "closed":
            server.close()
            await asyncio.sleep(orders.count / 10)
            server = await listen()

    await follow(orders, control, stopped, hang_up)
    server.close()
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sink")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument(
        "--careful", type=Path, help="certificate and key: ask for TLS and a log-in, one step at a time"
    )
    given = parser.parse_args()
    careful = None
    if given.careful is not None:
        careful = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        careful.load_cert_chain(given.careful)
    asyncio.run(run(given.port, given.journal, given.control, careful))


if __name__ == "__main__":
    main()
