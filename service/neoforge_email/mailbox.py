"""A local mailbox for trying things out and for tests: takes any mail by SMTP, keeps the newest, shows them on a page.

`python -m neoforge_email.mailbox --help`. It delivers nothing, so no mail leaves the machine. Standard library only:
the sending side is tested against a server that shares no code with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from . import mailbox_web

SIZE_LIMIT_BYTES = 50 << 20
LINE_LIMIT_BYTES = 4096
RECIPIENTS_LIMIT = 1000
IDLE_SECONDS = 300.0
EXTENSIONS = ("mailbox.localhost", "PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES")
ANSWERS = {
    b"EHLO": "".join(f"250-{line}\r\n" for line in EXTENSIONS).encode() + b"250 SIZE %d\r\n" % SIZE_LIMIT_BYTES,
    b"HELO": b"250 mailbox.localhost\r\n",
    b"RSET": b"250 2.0.0 Ok\r\n",
    b"NOOP": b"250 2.0.0 Ok\r\n",
    b"VRFY": b"252 2.1.5 Send some mail\r\n",
}
PATH = re.compile(rb"(?:FROM|TO):\s*<([^<>\r\n]*)>(.*)", re.IGNORECASE)
MESSAGE_ID = re.compile(rb"^Message-ID:\s*(\S+)", re.IGNORECASE | re.MULTILINE)
REFUSED = re.compile(r"smtp-([45]\d\d)@")


@dataclass(frozen=True, slots=True)
class Mail:
    """One arrival: its envelope and its content as it came, with the dots of the transfer taken out again."""

    number: int
    at: datetime
    sender: str
    recipients: tuple[str, ...]
    message_id: str | None
    content: bytes


class Store:
    """What has arrived. The oldest go when `keep` messages or `keep_bytes` are passed; numbers are never used again."""

    def __init__(self, *, keep: int = 5000, keep_bytes: int = 256 << 20, journal: Path | None = None) -> None:
        self.arrived = 0
        self._mails: dict[int, Mail] = {}
        self._bytes = 0
        self._keep, self._keep_bytes = keep, keep_bytes
        self._journal = None if journal is None else journal.open("ab", buffering=0)
        self._arrival = asyncio.Event()

    def add(self, sender: str, recipients: Sequence[str], content: bytes) -> Mail:
        """Keep one arrival; it stands in the journal when this returns."""
        head = content.partition(b"\r\n\r\n")[0]
        match = MESSAGE_ID.search(head)
        mail = Mail(
            self.arrived + 1,
            datetime.now(UTC),
            sender,
            tuple(recipients),
            match[1].decode("utf-8", "replace") if match else None,
            content,
        )
        if self._journal is not None:
            self._journal.write(_journal_line(mail))
        self.arrived = mail.number
        self._mails[mail.number] = mail
        self._bytes += len(content)
        while len(self._mails) > 1 and (len(self._mails) > self._keep or self._bytes > self._keep_bytes):
            oldest = self._mails.pop(next(iter(self._mails)))
            self._bytes -= len(oldest.content)
        self._arrival.set()
        return mail

    def get(self, number: int) -> Mail | None:
        return self._mails.get(number)

    @property
    def mails(self) -> list[Mail]:
        """What is kept, oldest first."""
        return list(self._mails.values())

    def clear(self) -> None:
        self._mails.clear()
        self._bytes = 0

    async def wait(self, count: int, seconds: float = 10) -> list[Mail]:
        """What is kept, once `count` messages have arrived since the start; raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while self.arrived < count:
                self._arrival.clear()
                await self._arrival.wait()
        return self.mails

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def _journal_line(mail: Mail) -> bytes:
    entry = {
        "at": mail.at.isoformat(),
        "message_id": mail.message_id,
        "sender": mail.sender,
        "recipients": mail.recipients,
        "size_bytes": len(mail.content),
    }
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


class Session(asyncio.Protocol):
    """One SMTP connection (RFC 5321) with PIPELINING (RFC 2920): all whole commands that came are answered at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buffer = bytearray()
        self._searched = 0
        self._answers: list[bytes] = []
        self._in_body = False
        self._sender: str | None = None
        self._recipients: list[str] = []
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._active = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # what a TCP server hands out
        self._transport = transport
        transport.write(b"220 mailbox.localhost ESMTP\r\n")
        self._watch()

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        """Close a connection that has been silent for `IDLE_SECONDS`."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._active = loop.time()
        elif loop.time() - self._active > IDLE_SECONDS:
            self._close(b"421 4.4.2 Silent for too long\r\n")
            return
        self._timer = loop.call_later(IDLE_SECONDS / 5, self._watch)

    def _close(self, answer: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._answers) + answer)
            self._transport.close()
        self._answers.clear()
        self._buffer.clear()

    def data_received(self, data: bytes) -> None:
        self._active = asyncio.get_running_loop().time()
        self._buffer += data
        while self._body() if self._in_body else self._command():
            pass
        if self._answers and self._transport is not None:
            self._transport.write(b"".join(self._answers))
            self._answers.clear()

    def _command(self) -> bool:
        """Take one command out of the buffer; False when there is no whole one."""
        end = self._buffer.find(b"\r\n")
        if end > LINE_LIMIT_BYTES or (end < 0 and len(self._buffer) > LINE_LIMIT_BYTES):
            self._close(b"500 5.5.6 Line too long\r\n")
            return False
        if end < 0:
            return False
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        verb, _, rest = line.partition(b" ")
        if verb.upper() == b"QUIT":
            self._close(b"221 2.0.0 Bye\r\n")
            return False
        self._answers.append(self._answer(verb.upper(), rest))
        return True

    def _answer(self, verb: bytes, rest: bytes) -> bytes:
        match verb:
            case b"EHLO" | b"HELO" | b"RSET":
                self._reset()
            case b"MAIL":
                return self._mail(rest)
            case b"RCPT":
                return self._rcpt(rest)
            case b"DATA":
                return self._data()
        return ANSWERS.get(verb, b"502 5.5.1 No such command\r\n")

    def _reset(self) -> None:
        self._sender = None
        self._recipients = []

    def _mail(self, rest: bytes) -> bytes:
        match = PATH.fullmatch(rest)
        if match is None or not rest[:5].upper().startswith(b"FROM"):
            return b"501 5.5.4 Write MAIL FROM:<address>\r\n"
        if self._sender is not None:
            return b"503 5.5.1 One sender a message\r\n"
        size = re.search(rb" SIZE=(\d{1,20})", match[2], re.IGNORECASE)
        if size is not None and int(size[1]) > SIZE_LIMIT_BYTES:
            return b"552 5.3.4 Message too big\r\n"
        self._sender = match[1].decode("utf-8", "replace")
        return b"250 2.1.0 Ok\r\n"

    def _rcpt(self, rest: bytes) -> bytes:
        match = PATH.fullmatch(rest)
        if match is None or not match[1] or not rest[:3].upper().startswith(b"TO"):
            return b"501 5.5.4 Write RCPT TO:<address>\r\n"
        if self._sender is None:
            return b"503 5.5.1 MAIL first\r\n"
        if len(self._recipients) >= RECIPIENTS_LIMIT:
            return b"452 4.5.3 Too many recipients\r\n"
        recipient = match[1].decode("utf-8", "replace")
        if refused := REFUSED.match(recipient):
            return f"{refused[1]} {refused[1][0]}.1.1 As this address asks for\r\n".encode()
        self._recipients.append(recipient)
        return b"250 2.1.5 Ok\r\n"

    def _data(self) -> bytes:
        if not self._recipients:
            return b"503 5.5.1 RCPT first\r\n"
        self._in_body, self._searched = True, 0
        return b"354 End with a line that holds a dot\r\n"

    def _body(self) -> bool:
        """Take a whole body out of the buffer; False when its end has not come. Only CRLF.CRLF ends a body."""
        if self._buffer.startswith(b".\r\n"):
            content, taken = b"", 3
        else:
            end = self._buffer.find(b"\r\n.\r\n", max(0, self._searched - 4))
            if end < 0:
                self._searched = len(self._buffer)
                if self._searched > SIZE_LIMIT_BYTES * 2:
                    self._close(b"552 5.3.4 Message too big\r\n")
                return False
            content, taken = bytes(self._buffer[: end + 2]), end + 5
        del self._buffer[:taken]
        self._in_body = False
        self._answers.append(self._keep(content))
        self._reset()
        return True

    def _keep(self, content: bytes) -> bytes:
        if len(content) > SIZE_LIMIT_BYTES:
            return b"552 5.3.4 Message too big\r\n"
        if content.startswith(b".") or b"\r\n." in content:
            content = content.removeprefix(b".").replace(b"\r\n.", b"\r\n")
        try:
            mail = self._store.add(self._sender or "", self._recipients, content)
        except OSError:
            return b"452 4.3.1 The journal cannot be written\r\n"
        return b"250 2.0.0 Ok: kept as %d\r\n" % mail.number


@contextlib.asynccontextmanager
async def smtp_server(store: Store, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Take mail into `store` while the context lasts; gives the port. Raises OSError where it cannot listen."""
    server = await asyncio.get_running_loop().create_server(lambda: Session(store), host, port, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def run(smtp: tuple[str, int], http: tuple[str, int], store: Store) -> None:
    """Serve until SIGTERM or SIGINT; SystemExit(2) with a line on standard error where an address cannot be had."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(smtp_server(store, *smtp))
        except OSError as error:
            _cannot_listen("--smtp", smtp, error)
        try:
            await stack.enter_async_context(mailbox_web.web_server(store, *http))
        except OSError as error:
            _cannot_listen("--http", http, error)
        sys.stdout.write(f"Mail to {smtp[0]}:{smtp[1]} is shown on http://{http[0]}:{http[1]}/\n")
        sys.stdout.flush()
        await stopped.wait()


def _cannot_listen(option: str, address: tuple[str, int], error: OSError) -> NoReturn:
    reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({os.strerror(error.errno or 0)})"
    sys.stderr.write(f"mailbox: {address[0]}:{address[1]} {reason}: choose another with {option} HOST:PORT\n")
    raise SystemExit(2)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError("write HOST:PORT, such as 127.0.0.1:2525")
    return host.strip("[]") or "127.0.0.1", int(port)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("write a number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m neoforge_email.mailbox",
        description="Take any mail by SMTP, keep the newest in memory and show them on a web page. Delivers nothing.",
        epilog="A recipient such as smtp-550@example.com is refused with that code, smtp-451@ likewise.",
    )
    parser.add_argument(
        "--smtp",
        type=_address,
        default=("127.0.0.1", 2525),
        metavar="HOST:PORT",
        help="take mail here (127.0.0.1:2525)",
    )
    parser.add_argument(
        "--http",
        type=_address,
        default=("127.0.0.1", 8025),
        metavar="HOST:PORT",
        help="show the page here, and JSON at /api/messages (127.0.0.1:8025); it has no log-in",
    )
    parser.add_argument("--keep", type=_count, default=5000, metavar="N", help="keep the newest N messages (5000)")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="append a JSON line with Message-ID and recipients to FILE for each arrival, before it is answered",
    )
    given = parser.parse_args(arguments)
    try:
        store = Store(keep=given.keep, journal=given.journal)
    except OSError as error:
        parser.error(f"--journal {given.journal}: {error.strerror}")
    try:
        asyncio.run(run(given.smtp, given.http, store))
    finally:
        store.close()


if __name__ == "__main__":
    main()
