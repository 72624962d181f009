"""The mailbox as SMTP clients, browsers and programs meet it: over real sockets, the last tests as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path

import httpx
import pytest

from neoforge_email import mailbox
from neoforge_email.mailbox import Store, smtp_server
from neoforge_email.mailbox_web import web_server


@dataclass(frozen=True)
class Box:
    """A running mailbox."""

    store: Store
    smtp_port: int
    web: httpx.AsyncClient

    async def send(self, *messages: EmailMessage) -> None:
        """By the standard library's client."""

        def work() -> None:
            with smtplib.SMTP("127.0.0.1", self.smtp_port) as client:
                for message in messages:
                    client.send_message(message)

        await asyncio.to_thread(work)

    async def talk(self, *parts: bytes) -> bytes:
        """Write `parts`, each at once, and return everything that is answered until the mailbox closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.smtp_port)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
        return answer


@pytest.fixture
async def box() -> AsyncIterator[Box]:
    store = Store()
    async with smtp_server(store) as smtp, web_server(store) as web, httpx.AsyncClient() as client:
        client.base_url = f"http://127.0.0.1:{web}"
        yield Box(store, smtp, client)


def a_mail(subject: str = "Hello", *, html: str | None = None) -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "Ann <ann@example.com>", "bob@example.org", subject
    mail["Message-ID"] = f"<{abs(hash(subject)):x}@example.com>"
    mail.set_content("First line\n.\n..dots\nÄ\n")
    if html is not None:
        mail.add_alternative(html, subtype="html")
    return mail


ENVELOPE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n"
BODY = b"Message-ID: <1@example.com>\r\n\r\nHello\r\n.\r\n"


def codes(answer: bytes) -> list[bytes]:
    """The codes of final lines, without the greeting."""
    return [line[:3] for line in answer.splitlines() if line[3:4] == b" "][1:]


async def test_a_mail_is_kept_as_it_was_sent_with_its_dots(box: Box) -> None:
    await box.send(a_mail())
    [mail] = box.store.mails
    assert (mail.sender, mail.recipients) == ("ann@example.com", ("bob@example.org",))
    assert b"First line\r\n.\r\n..dots\r\n" in mail.content
    view = (await box.web.get("/api/messages/1")).json()
    assert view["text"] == "First line\r\n.\r\n..dots\r\nÄ\r\n"


async def test_a_whole_session_in_one_write_is_answered_command_by_command(box: Box) -> None:
    sent = b"EHLO client\r\n" + (ENVELOPE + b"DATA\r\n" + BODY) * 3 + b"QUIT\r\n"
    answer = await box.talk(sent)
    assert b"250-PIPELINING\r\n" in answer
    assert codes(answer) == [b"250", *[b"250", b"250", b"354", b"250"] * 3, b"221"]
    assert box.store.arrived == 3


async def test_a_session_that_comes_byte_by_byte_is_understood(box: Box) -> None:
    sent = b"HELO c\r\n" + ENVELOPE + b"DATA\r\n.\r\nQUIT\r\n"
    assert codes(await box.talk(*(bytes([byte]) for byte in sent))) == [b"250", b"250", b"250", b"354", b"250", b"221"]
    assert [mail.content for mail in box.store.mails] == [b""]


async def test_only_a_dot_between_crlfs_ends_a_body(box: Box) -> None:
    body = b"one\n.\ntwo\r.\rthree\r\n.\nfour\n.\r\nfive\r\n.\r\n"
    assert codes(await box.talk(b"HELO c\r\n" + ENVELOPE + b"DATA\r\n", body, b"QUIT\r\n"))[-2:] == [b"250", b"221"]
    [mail] = box.store.mails
    assert mail.content.endswith(b"five\r\n")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (b"DATA", b"503"),
        (b"RCPT TO:<b@example.com>", b"503"),
        (b"MAIL FROM:a@example.com", b"501"),
        (b"MAIL TO:<a@example.com>", b"501"),
        (b"MAIL FROM:<a@example.com> SIZE=99999999999", b"552"),
        (b"STARTTLS", b"502"),
        (b"", b"502"),
        (b"\xff\xfe", b"502"),
        (b"x" * 5000, b"500"),
    ],
)
async def test_what_is_not_smtp_is_refused(box: Box, command: bytes, code: bytes) -> None:
    assert codes(await box.talk(b"EHLO c\r\n" + command + b"\r\nQUIT\r\n"))[1] == code
    assert box.store.arrived == 0


async def test_an_address_that_asks_for_a_refusal_gets_it_and_the_others_get_their_mail(box: Box) -> None:
    refused = b"RCPT TO:<smtp-550@example.com>\r\nRCPT TO:<smtp-451@example.com>\r\n"
    answer = await box.talk(b"EHLO c\r\n" + ENVELOPE + refused + b"DATA\r\n" + BODY + b"QUIT\r\n")
    assert codes(answer) == [b"250", b"250", b"250", b"550", b"451", b"354", b"250", b"221"]
    assert box.store.mails[0].recipients == ("b@example.com",)


async def test_the_oldest_go_when_the_bound_is_passed_and_numbers_go_on() -> None:
    store = Store(keep=3, keep_bytes=100)
    for _ in range(5):
        store.add("a@example.com", ["b@example.com"], b"x" * 10)
    assert [mail.number for mail in store.mails] == [3, 4, 5]
    store.add("a@example.com", ["b@example.com"], b"x" * 95)
    assert [mail.number for mail in store.mails] == [6]


async def test_the_list_is_newest_first_and_can_be_narrowed(box: Box) -> None:
    await box.send(a_mail("one"), a_mail("two ✓"), a_mail("three"))
    found = (await box.web.get("/api/messages")).json()
    assert (found["arrived"], found["kept"]) == (3, 3)
    assert [mail["subject"] for mail in found["messages"]] == ["three", "two ✓", "one"]
    assert [mail["n"] for mail in (await box.web.get("/api/messages?after=1&limit=1")).json()["messages"]] == [3]
    wanted = {"message_id": found["messages"][1]["message_id"]}
    assert [mail["n"] for mail in (await box.web.get("/api/messages", params=wanted)).json()["messages"]] == [2]


async def test_html_of_a_mail_is_served_without_any_right(box: Box) -> None:
    await box.send(a_mail(html="<script>alert(1)</script>"))
    answer = await box.web.get("/messages/1/html")
    assert "<script>" in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert "allow-scripts" not in policy
    raw = await box.web.get("/messages/1/raw")
    assert (raw.headers["content-type"], raw.content) == ("text/plain; charset=utf-8", box.store.mails[0].content)


async def test_the_page_allows_only_itself_and_names_no_other_place(box: Box) -> None:
    for path in ("/", "/app.js", "/style.css", "/icon.svg"):
        answer = await box.web.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "innerHTML" not in answer.text
        assert "//" not in answer.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


@pytest.mark.parametrize("path", ["/nothing", "/api/messages/9", "/messages/1", "/messages/1/html", "/../settings.py"])
async def test_what_is_not_there_is_404(box: Box, path: str) -> None:
    await box.send(a_mail())
    assert (await box.web.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8025", 200), ("[::1]:8025", 200), ("sink", 200), ("rebound.example.com", 421), ("", 421)],
)
async def test_a_name_of_the_public_dns_is_refused(box: Box, host: str, status: int) -> None:
    assert (await box.web.get("/api/messages", headers={"Host": host})).status_code == status


async def test_the_web_server_reads_only(box: Box) -> None:
    assert (await box.web.post("/api/messages")).status_code == 405
    head = await box.web.head("/api/messages")
    assert (head.status_code, head.content) == (200, b"")


async def test_what_is_not_http_is_answered_or_closed_and_harms_nobody(box: Box) -> None:
    port = box.web.base_url.port
    assert port is not None
    for garbage in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"x" * 40000):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(garbage)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = await asyncio.wait_for(reader.read(), 15)
        writer.close()
        assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert (await box.web.get("/api/messages")).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no header at all",
        b"Subject: =?utf-8?b?!!!?=\r\nFrom: =?nonsense?q?x?=\r\n\r\nx",
        b"Subject: \xff\xfe\r\n\r\n\xff",
        b"Content-Type: text/plain; charset=nonsense\r\nContent-Transfer-Encoding: base64\r\n\r\n!!",
        b"Content-Type: multipart/mixed\r\n\r\nno boundary",
        b"Content-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner",
        b"Content-Type: text/html; charset=utf-7\r\n\r\n+\x00",
    ],
)
async def test_a_broken_mail_can_be_looked_at(box: Box, content: bytes) -> None:
    box.store.add("", ["b@example.com"], content)
    assert (await box.web.get("/api/messages")).status_code == 200
    assert (await box.web.get("/api/messages/1")).status_code == 200
    assert (await box.web.get("/messages/1/raw")).content == content


async def test_every_arrival_is_in_the_journal_before_it_is_answered(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    store = Store(keep=10, journal=journal)
    async with smtp_server(store) as port:
        box = Box(store, port, httpx.AsyncClient())
        await box.talk(b"EHLO c\r\n" + (ENVELOPE + b"DATA\r\n" + BODY) * 100 + b"QUIT\r\n")
    entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert len(entries) == 100
    assert entries[0]["message_id"] == "<1@example.com>"
    assert entries[0]["recipients"] == ["b@example.com"]
    store.close()


async def test_a_journal_that_cannot_be_written_refuses_the_mail_for_now() -> None:
    store = Store(journal=Path("/dev/full"))
    async with smtp_server(store) as port:
        answer = await Box(store, port, httpx.AsyncClient()).talk(
            b"EHLO c\r\n" + ENVELOPE + b"DATA\r\n" + BODY + b"QUIT\r\n"
        )
    assert codes(answer)[-2:] == [b"452", b"221"]
    assert store.arrived == 0
    store.close()


async def test_five_thousand_pipelined_mails_on_eight_connections_all_arrive(box: Box) -> None:
    window = (ENVELOPE + b"DATA\r\n" + BODY) * 25
    await asyncio.gather(*(box.talk(b"EHLO c\r\n", *[window] * 25, b"QUIT\r\n") for _ in range(8)))
    assert len(await box.store.wait(5000)) == 5000


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        mailbox.main(["--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--smtp", "--http", "--keep", "--journal"))


@pytest.mark.parametrize(
    "arguments", [["--smtp", "2525"], ["--http", "localhost:0"], ["--keep", "0"], ["--journal", "/nowhere/file"]]
)
def test_a_bad_option_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        mailbox.main(arguments)
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_taken_port_is_an_error_that_names_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-m", "neoforge_email.mailbox", "--smtp", address],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert ended.returncode == 2
    assert ended.stderr == f"mailbox: {address} is taken: choose another with --smtp HOST:PORT\n"


def test_sigterm_ends_it_with_exit_code_0_and_a_connected_client_does_not_hold_it_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        smtp, web = one.getsockname()[1], two.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "neoforge_email.mailbox",
        "--smtp",
        f"127.0.0.1:{smtp}",
        "--http",
        f"127.0.0.1:{web}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"Mail to 127.0.0.1:{smtp} is shown on http://127.0.0.1:{web}/\n"
        with socket.create_connection(("127.0.0.1", smtp)):
            started = time.monotonic()
            process.terminate()
            assert process.wait(10) == 0
            assert time.monotonic() - started < 2
