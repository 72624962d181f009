"""The bounce listener as mail servers meet it, over real sockets on a real PostgreSQL; the last tests as a process."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from neoforge_email import bounces, db
from neoforge_email.bounces import Limits
from neoforge_email.errors import SettingsError
from neoforge_email.inbound import dsn, receipts
from neoforge_email.providers.base import Outcome
from neoforge_email.settings import Settings
from tests.support import Database

from .test_api_process import base_environment, free_port
from .test_dsn import ATTEMPT, mail
from .test_normaliser import Desk, desk

__all__ = ["desk"]  # a fixture

DOMAIN = "bounces.example.com"
RETURN_PATH = f"bounce+{ATTEMPT}@{DOMAIN}"
ENVELOPE = f"MAIL FROM:<>\r\nRCPT TO:<{RETURN_PATH}>\r\n".encode()
BODY = b"Message-ID: <1@example.com>\r\n\r\nHello\r\n"
MAIL = ENVELOPE + b"DATA\r\n" + BODY + b".\r\n"

Listening = Callable[..., AbstractAsyncContextManager[int]]


@pytest.fixture
def listening(make_settings: Callable[..., Settings]) -> Listening:
    """`async with listening(Limits(…), DATABASE_URL=…) as port`."""

    @asynccontextmanager
    async def listen(limits: Limits | None = None, **variables: str) -> AsyncIterator[int]:
        port = free_port()
        settings = make_settings("api", **{"BOUNCE_DOMAIN": DOMAIN, "BOUNCE_PORT": str(port), **variables})
        async with bounces.listening(settings, limits):
            yield port

    return listen


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[db.Connection]:
    connection = await db.connect(Database.url(database.superuser), "test")
    yield connection
    await connection.close()


async def stored(connection: db.Connection) -> list[asyncpg.Record]:
    return await connection.fetch("select provider, event_id, body, state::text from provider_receipts order by id")


async def talk(port: int, *parts: bytes, pause: float = 0.01) -> bytes:
    """Write `parts`, each at once, and return everything that is answered until the listener closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def send(port: int, *recipients: str, content: bytes = BODY) -> bytes:
    """The answer to one mail's end."""
    envelope = b"MAIL FROM:<>\r\n" + b"".join(f"RCPT TO:<{name}>\r\n".encode() for name in recipients or (RETURN_PATH,))
    answers = await talk(port, b"EHLO mx\r\n" + envelope + b"DATA\r\n" + content + b".\r\nQUIT\r\n")
    return answers.splitlines()[-2]


def codes(answer: bytes) -> list[bytes]:
    """The codes of final lines, without the greeting."""
    return [line[:3] for line in answer.splitlines() if line[3:4] == b" "][1:]


def counted(result: str) -> float:
    return REGISTRY.get_sample_value("bounces_received_total", {"result": result}) or 0


async def test_a_bounce_that_comes_back_ends_in_a_status_and_a_suppression(desk: Desk, listening: Listening) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.way.answer(claimed, Outcome.TAKEN)
    content = mail("postfix-failed").replace(ATTEMPT.encode(), claimed.message.attempt.encode())
    async with listening() as port:
        answer = await send(port, f"bounce+{claimed.message.attempt}@{DOMAIN}", content=content)
    assert answer == b"250 2.0.0 Ok: stored"
    await desk.work_off()
    assert await desk.states() == {"done": 1}
    assert await desk.way.statuses() == ["bounced"]
    assert await desk.way.superuser.fetchval("select address from suppressions") == "ada@example.net"


async def test_a_complaint_at_the_feedback_address_finds_its_message(desk: Desk, listening: Listening) -> None:
    await desk.way.accept()
    claimed = await desk.way.attempt()
    await desk.way.answer(claimed, Outcome.TAKEN)
    content = mail("arf-masked").replace(ATTEMPT.encode(), claimed.message.attempt.encode())
    async with listening() as port:
        assert (await send(port, f"fbl@{DOMAIN}", content=content)).startswith(b"250 ")
    await desk.work_off()
    assert await desk.way.statuses() == ["complained"]


async def test_what_is_stored_is_the_mail_as_it_came_and_who_it_was_for(
    listening: Listening, superuser: db.Connection
) -> None:
    content = b"Subject: x\r\n\r\n.\r\n..dots\r\nbare\nLF\n.\nand\rCR \x00\xff\xc3\xa4\r\n" + b"y" * 70_000 + b"\r\n"
    dotted = b"".join(b"." + line if line.startswith(b".") else line for line in content.split(b"\r\n" * 9))
    dotted = dotted.replace(b"\r\n.", b"\r\n..")
    before = datetime.now(UTC)
    async with listening() as port:
        assert (await send(port, RETURN_PATH.upper(), content=dotted)).startswith(b"250 ")
    [receipt] = await stored(superuser)
    envelope, kept = dsn.unpack(receipt["body"])
    assert kept == content
    assert (envelope.recipient, envelope.peer) == (RETURN_PATH, "127.0.0.1")
    assert before <= envelope.at <= datetime.now(UTC)
    assert (receipt["provider"], receipt["state"]) == ("mail", "waiting")
    assert receipt["event_id"] == dsn.event_id(RETURN_PATH, content)


async def test_nothing_is_answered_before_the_commit(listening: Listening, superuser: db.Connection) -> None:
    async with listening() as port:
        async with superuser.transaction():
            await superuser.execute("lock table provider_receipts in exclusive mode")
            sending = asyncio.create_task(send(port))
            _, waiting = await asyncio.wait([sending], timeout=0.5)
            assert waiting
        assert (await sending).startswith(b"250 ")
    assert len(await stored(superuser)) == 1


async def test_the_doorbell_rings_after_the_commit(
    listening: Listening, superuser: db.Connection, redis_url: str, settings: Settings
) -> None:
    async with Redis.from_url(redis_url) as redis, redis.pubsub() as pubsub, listening() as port:
        await pubsub.subscribe(settings.doorbell_channel)
        assert (await pubsub.get_message(timeout=5) or {})["type"] == "subscribe"
        await send(port)
        assert (await pubsub.get_message(timeout=5) or {})["type"] == "message"


async def test_without_redis_mail_is_taken_all_the_same(listening: Listening, superuser: db.Connection) -> None:
    async with listening(REDIS_URL="redis://127.0.0.1:1/0") as port:
        assert (await send(port)).startswith(b"250 ")
    assert len(await stored(superuser)) == 1


RECIPIENTS = [
    (RETURN_PATH, b"250"),
    (RETURN_PATH.upper(), b"250"),
    (f"@relay.example.net:{RETURN_PATH}", b"250"),
    ("Postmaster", b"250"),
    (f"fbl@{DOMAIN}", b"250"),
    (f"Abuse@{DOMAIN}", b"250"),
    (f"postmaster@{DOMAIN.upper()}", b"250"),
    ("ada@example.net", b"550"),
    (f"ada@{DOMAIN}", b"550"),
    (f"bounce@{DOMAIN}", b"550"),
    (f"bounce+@{DOMAIN}", b"550"),
    (f"bounce+{ATTEMPT}x@{DOMAIN}", b"550"),
    (f"bounce+{ATTEMPT[:-2]}@{DOMAIN}", b"550"),
    (f"bounce+{ATTEMPT}@example.com", b"550"),
    (f"bounce+{ATTEMPT}@sub.{DOMAIN}", b"550"),
    (f"bounce+{ATTEMPT}%example.net@{DOMAIN}", b"550"),
    (f"{DOMAIN}!ada@example.net", b"550"),
    (f"fbl%example.net@{DOMAIN}", b"550"),
    ("jörg@example.net", b"550"),
    ("fbl", b"550"),
    ("", b"550"),
    ("<", b"553"),
]


async def test_only_mail_about_our_own_is_taken_and_none_is_relayed(
    listening: Listening, superuser: db.Connection
) -> None:
    refused = counted("refused")
    async with listening() as port:
        for recipient, code in RECIPIENTS:
            session = f"EHLO mx\r\nMAIL FROM:<>\r\nRCPT TO:<{recipient}>\r\nQUIT\r\n".encode()
            assert (recipient, codes(await talk(port, session))) == (recipient, [b"250", b"250", code, b"221"])
    assert counted("refused") - refused == sum(code == b"550" for _, code in RECIPIENTS)
    assert await stored(superuser) == []


async def test_a_mail_to_several_of_ours_is_a_receipt_each(listening: Listening, superuser: db.Connection) -> None:
    other = f"bounce+{uuid4().hex}-1@{DOMAIN}"
    async with listening() as port:
        assert (await send(port, RETURN_PATH, other, RETURN_PATH)).startswith(b"250 ")
    assert {dsn.unpack(receipt["body"])[0].recipient for receipt in await stored(superuser)} == {RETURN_PATH, other}
    assert len(await stored(superuser)) == 2


async def test_a_mail_that_comes_again_is_stored_once(listening: Listening, superuser: db.Connection) -> None:
    known = counted("known")
    async with listening() as port:
        for relay in (b"a", b"a", b"b"):
            content = b"Received: from " + relay + b" by mx\r\n" + mail("postfix-failed")
            assert (await send(port, content=content)).startswith(b"250 ")
        assert (await send(port, content=mail("postfix-delayed"))).startswith(b"250 ")
    assert len(await stored(superuser)) == 2
    assert counted("known") - known == 2


async def test_while_the_database_is_away_the_sender_keeps_its_mail(
    listening: Listening, superuser: db.Connection
) -> None:
    unavailable = counted("unavailable")
    async with listening(DATABASE_URL="postgresql://neoforge_api@127.0.0.1:1/none") as port:
        assert (await send(port)).startswith(b"451 4.3.0 ")
    assert counted("unavailable") - unavailable == 1
    async with listening() as port:
        assert (await send(port)).startswith(b"250 ")
    assert len(await stored(superuser)) == 1


async def test_a_connection_to_the_database_that_is_cut_while_it_stores_loses_nothing(
    listening: Listening, superuser: db.Connection
) -> None:
    async with listening() as port:
        async with superuser.transaction():
            await superuser.execute("lock table provider_receipts in exclusive mode")
            sending = asyncio.create_task(send(port))
            cut = 0
            while not cut:
                await superuser.execute("select pg_stat_clear_snapshot()")
                cut = await superuser.fetchval(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database()"
                    " and application_name = 'neoforge-bounces' and wait_event_type = 'Lock'"
                )
            assert (await sending).startswith(b"451 ")
        assert (await send(port)).startswith(b"250 ")
    assert len(await stored(superuser)) == 1


async def test_a_database_that_does_not_answer_is_waited_for_no_longer_than_a_sender_waits(
    listening: Listening, superuser: db.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipts, "LIMIT", timedelta(seconds=0.2))
    async with listening() as port:
        async with superuser.transaction():
            await superuser.execute("lock table provider_receipts in exclusive mode")
            assert (await send(port)).startswith(b"451 ")
        assert (await send(port)).startswith(b"250 ")
    assert len(await stored(superuser)) == 1


async def test_a_fault_of_ours_refuses_no_mail_for_good(listening: Listening, superuser: db.Connection) -> None:
    await superuser.execute("revoke execute on function receive from neoforge_api")
    async with listening() as port:
        answers = await talk(port, b"EHLO mx\r\n" + MAIL + MAIL + b"QUIT\r\n")
    assert codes(answers) == [b"250", *[b"250", b"250", b"354", b"451"] * 2, b"221"]


async def test_what_is_too_big_is_refused_and_the_next_mail_is_taken(
    listening: Listening, superuser: db.Connection
) -> None:
    too_big = counted("too_big")
    async with listening(Limits(mail_bytes=1000)) as port:
        big = ENVELOPE + b"DATA\r\n" + b"x" * 998 + b"\r\nx\r\n.\r\n"
        fits = ENVELOPE + b"DATA\r\n" + b"y" * 998 + b"\r\n.\r\n"
        answers = await talk(port, b"EHLO mx\r\nMAIL FROM:<> SIZE=1001\r\n" + big + fits + b"QUIT\r\n")
    assert b"250-SIZE 1000\r\n" in answers
    assert codes(answers) == [b"250", b"552", b"250", b"250", b"354", b"552", b"250", b"250", b"354", b"250", b"221"]
    assert [dsn.unpack(receipt["body"])[1] for receipt in await stored(superuser)] == [b"y" * 998 + b"\r\n"]
    assert counted("too_big") - too_big == 1


@pytest.mark.parametrize("piece", [b"x" * 65536, b"\r\n" * 32768, b".\r" * 32768])
async def test_a_mail_without_an_end_takes_no_more_memory_than_one_mail(listening: Listening, piece: bytes) -> None:
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"EHLO mx\r\n" + ENVELOPE + b"DATA\r\n")
        await reader.readuntil(b"354 End with a line that holds a dot\r\n")
        tracemalloc.start()
        try:
            for _ in range(128):
                writer.write(piece)
                await writer.drain()
            assert tracemalloc.get_traced_memory()[1] < 6 << 20
        finally:
            tracemalloc.stop()
        writer.write(b"x\r\n.\r\nQUIT\r\n")
        assert (await reader.readline()).startswith(b"552 ")
        writer.close()


async def test_a_whole_session_in_one_write_is_answered_command_by_command(
    listening: Listening, superuser: db.Connection
) -> None:
    mails = b"".join(MAIL.replace(b"Hello", b"Hello %d" % number) for number in range(3))
    async with listening() as port:
        answers = await talk(port, b"EHLO mx\r\n" + mails + b"QUIT\r\n")
    assert b"250-PIPELINING\r\n" in answers
    assert b"250-SMTPUTF8\r\n" in answers
    assert codes(answers) == [b"250", *[b"250", b"250", b"354", b"250"] * 3, b"221"]
    assert len(await stored(superuser)) == 3


async def test_a_session_that_comes_byte_by_byte_is_understood(listening: Listening, superuser: db.Connection) -> None:
    sent = b"HELO c\r\n" + MAIL + b"QUIT\r\n"
    async with listening() as port:
        answers = await talk(port, *(bytes([byte]) for byte in sent), pause=0.001)
    assert codes(answers) == [b"250", b"250", b"250", b"354", b"250", b"221"]
    [receipt] = await stored(superuser)
    assert dsn.unpack(receipt["body"])[1] == BODY


COMMANDS = [
    (b"DATA", b"503"),
    (b"RCPT TO:<" + RETURN_PATH.encode() + b">", b"503"),
    (b"MAIL FROM:<a@example.com", b"553"),
    (b"MAIL FROM:<", b"553"),
    (b"MAIL TO:<a@example.com>", b"501"),
    (b"MAIL FROM:<> SIZE=many", b"501"),
    (b"MAIL FROM:<> SIZE=99999999999", b"552"),
    (b"MAIL FROM:<> NONSENSE=1", b"555"),
    (b"STARTTLS", b"454"),
    (b"AUTH PLAIN AHVzZXIAcGFzc3dvcmQ=", b"538"),
    (b"AUTH LOGIN", b"538"),
    (b"BDAT 10 LAST", b"500"),
    (b"VRFY ada@example.net", b"252"),
    (b"VRFY \xff", b"252"),
    (b"EXPN all", b"502"),
    (b"", b"500"),
    (b"\xff\xfe", b"500"),
    (b"GET / HTTP/1.1", b"500"),
    (b"x" * 5000, b"500"),
    (b"x" * 50000, b"500"),
]


async def test_what_is_not_for_this_server_is_refused_and_the_mail_after_it_is_taken(
    listening: Listening, superuser: db.Connection
) -> None:
    async with listening() as port:
        for command, code in COMMANDS:
            answers = codes(await talk(port, b"EHLO mx\r\n" + command + b"\r\n" + MAIL + b"QUIT\r\n"))
            assert (command, answers[1], answers[-2:]) == (command, code, [b"250", b"221"])
    assert len(await stored(superuser)) == 1


async def test_nonsense_and_endless_commands_end_the_session(listening: Listening) -> None:
    async with listening() as port:
        assert codes(await talk(port, b"EHLO mx\r\n" + b"X\r\n" * 20))[-1] == b"502"
        assert codes(await talk(port, b"EHLO mx\r\n" + b"NOOP\r\n" * 30))[-1] == b"421"


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"EHLO mx\r\n",),
        (b"EHLO mx\r\n" + ENVELOPE + b"DATA\r\n", b"half a mail"),
        (b"EHLO mx\r\n" + ENVELOPE + b"DATA\r\n", *[b"x"] * 20),
        (b"EHLO mx\r\n", *[b"N"] * 20),
    ],
)
async def test_a_client_that_is_too_slow_is_hung_up_on(
    listening: Listening, superuser: db.Connection, parts: tuple[bytes, ...]
) -> None:
    started = time.monotonic()
    async with listening(Limits(idle=timedelta(seconds=0.3))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)
        answers = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert answers.splitlines()[-1] == b"421 4.4.2 Too slow"
    assert 0.25 < time.monotonic() - started < 10
    assert await stored(superuser) == []


async def test_a_client_that_reads_no_answer_is_got_rid_of_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounces, "LINGER", timedelta(seconds=0.2))
    lost = asyncio.Event()

    class Full(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"x" * (16 << 20))
            bounces.hang_up(transport, "421 Too slow")

        def connection_lost(self, _: Exception | None) -> None:
            lost.set()

    server = await asyncio.get_running_loop().create_server(Full, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()):
        await asyncio.wait_for(lost.wait(), 10)
    server.close()


async def test_no_session_lasts_for_ever(listening: Listening) -> None:
    async with listening(Limits(session=timedelta(seconds=0.5))) as port:
        answers = await talk(port, b"EHLO mx\r\n", *[b"RSET\r\n"] * 3, pause=0.1)
    assert answers.splitlines()[-1] == b"421 4.4.2 Too slow"


async def test_too_many_connections_are_sent_away_until_others_end(listening: Listening) -> None:
    crowded = counted("crowded")
    async with listening(Limits(connections=5, connections_a_peer=3)) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for reader, _ in held:
            assert (await reader.readline()).startswith(b"220 ")
        assert (await talk(port)).startswith(b"421 4.7.0 ")
        others = [await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0)) for _ in range(3)]
        greetings = [await reader.readline() for reader, _ in others]
        assert [greeting[:4] for greeting in greetings] == [b"220 ", b"220 ", b"421 "]
        for _, writer in held + others:
            writer.close()
        while b"250" not in codes(await talk(port, b"EHLO mx\r\nQUIT\r\n")):
            await asyncio.sleep(0.01)
    assert counted("crowded") - crowded >= 2


async def test_more_than_can_be_stored_in_an_hour_is_put_off(listening: Listening, superuser: db.Connection) -> None:
    async with listening(Limits(bytes_an_hour=3 * len(BODY))) as port:
        answers = [await send(port, content=BODY.replace(b"1", b"%d" % number)) for number in range(4)]
    assert [answer[:3] for answer in answers] == [b"250", b"250", b"250", b"452"]
    assert len(await stored(superuser)) == 3


async def test_five_hundred_mails_at_once_are_each_stored_once(listening: Listening, superuser: db.Connection) -> None:
    async with listening(Limits(connections=500, connections_a_peer=500)) as port:
        contents = [mail("postfix-failed").replace(b"Message-Id: <", b"Message-Id: <%d." % n) for n in range(500)]
        answers = await asyncio.gather(*(send(port, content=content) for content in contents))
    assert set(answers) == {b"250 2.0.0 Ok: stored"}
    kept = [dsn.unpack(receipt["body"])[1] for receipt in await stored(superuser)]
    assert sorted(kept) == sorted(contents)


async def test_two_that_deliver_the_same_mails_at_once_store_them_once(
    listening: Listening, superuser: db.Connection
) -> None:
    async with listening(Limits(connections=200, connections_a_peer=200)) as port:
        contents = [BODY.replace(b"Hello", b"Hello %d" % (n % 50)) for n in range(200)]
        answers = await asyncio.gather(*(send(port, content=content) for content in contents))
    assert set(answers) == {b"250 2.0.0 Ok: stored"}
    assert len(await stored(superuser)) == 50


async def test_mail_comes_over_tls_where_there_is_a_certificate(
    listening: Listening, superuser: db.Connection, tmp_path: Path
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, DOMAIN)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(DOMAIN)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "certificate"))

    def deliver(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, local_hostname="mx.example.net") as client:
            client._host = DOMAIN  # type: ignore[attr-defined]  # whose certificate is asked for
            client.starttls(context=context)
            client.sendmail("", [RETURN_PATH], mail("postfix-failed"))

    tls = {"SSL_CERTFILE": str(tmp_path / "certificate"), "SSL_KEYFILE": str(tmp_path / "key")}
    async with listening(**tls) as port:
        await asyncio.to_thread(deliver, port)
    [receipt] = await stored(superuser)
    assert dsn.unpack(receipt["body"])[1] == mail("postfix-failed")


async def test_without_a_domain_it_does_not_start(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="BOUNCE_DOMAIN: set it to the domain whose MX record"):
        await bounces.run(settings)


async def test_a_taken_port_is_an_error_that_names_the_setting(listening: Listening) -> None:
    async with listening() as port:
        with pytest.raises(SettingsError, match=r"^BOUNCE_HOST, BOUNCE_PORT: "):
            async with listening(BOUNCE_PORT=str(port)):
                pass


COMMAND = (sys.executable, "-m", "neoforge_email.cli", "bounces")


@contextmanager
def process(
    environment: dict[str, str],
    log: Path,
    command: Sequence[str] = COMMAND,
    pass_fds: Sequence[int] = (),
    **variables: str,
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`neoforge bounces`, and its port."""
    port = free_port()
    changed = {
        "BOUNCE_DOMAIN": DOMAIN,
        "BOUNCE_PORT": str(port),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        **variables,
    }
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, env={**base_environment(), **environment, **changed}, stderr=output, pass_fds=pass_fds
        )
    try:
        while started.poll() is None and "bounces.started" not in log.read_text():
            time.sleep(0.02)
        yield started, port
    finally:
        started.kill()
        started.wait()


def test_a_socket_that_systemd_opened_is_used(environment: dict[str, str], database: Database, tmp_path: Path) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as opened:
        # descriptor 3, and the process's own number in LISTEN_PID
        script = f"exec 3<&{opened.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec {shlex.join(COMMAND)}"
        with process(environment, tmp_path / "log", ["bash", "-c", script], [opened.fileno()]) as (running, unused):
            with smtplib.SMTP("127.0.0.1", opened.getsockname()[1], timeout=10) as client:
                client.sendmail("", [RETURN_PATH], BODY)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", unused)).close()
            running.terminate()
            assert running.wait(10) == 0

    async def bodies() -> list[bytes]:
        connection = await db.connect(Database.url(database.superuser), "test")
        try:
            return [receipt["body"] for receipt in await stored(connection)]
        finally:
            await connection.close()

    assert [dsn.unpack(body)[0].peer for body in asyncio.run(bodies())] == ["127.0.0.1"]


def test_sigterm_finishes_the_mail_under_way_sends_idle_clients_away_and_ends_with_exit_code_0(
    environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        process(environment, log) as (running, port),
        socket.create_connection(("127.0.0.1", port), timeout=10) as idle,
        socket.create_connection(("127.0.0.1", port), timeout=10) as busy,
        busy.makefile("rb") as answers,
    ):
        assert idle.recv(100).startswith(b"220 ")
        busy.sendall(b"EHLO mx\r\n" + ENVELOPE + b"DATA\r\nSubject: half\r\n")
        while not answers.readline().startswith(b"354 "):
            pass
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert idle.recv(100).startswith(b"421 4.3.2 ")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
        busy.sendall(b"\r\nthe other half\r\n.\r\n")
        assert answers.readline().startswith(b"250 2.0.0 ")
        assert answers.readline().startswith(b"421 4.3.2 ")
        assert running.wait(10) == 0
        assert time.monotonic() - started < 10
    said = log.read_text()
    assert "bounces.received" in said
    assert "bounces.stopped" in said
    assert ATTEMPT not in said
    assert "@" not in said.replace(environment["DATABASE_URL"], "")


def test_a_client_that_never_finishes_holds_up_the_end_no_longer_than_it_may(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with (
        process(environment, tmp_path / "log", GRACEFUL_SHUTDOWN_TIMEOUT="1") as (running, port),
        socket.create_connection(("127.0.0.1", port), timeout=10) as busy,
    ):
        busy.sendall(b"EHLO mx\r\n" + ENVELOPE + b"DATA\r\n")
        while b"354 " not in busy.recv(1000):
            pass
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
        assert 0.9 < time.monotonic() - started < 10


def test_a_process_without_a_domain_says_what_to_set(environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(environment, log, BOUNCE_DOMAIN="") as (ended, _):
        assert ended.wait(10) == 2
    assert log.read_text().startswith("BOUNCE_DOMAIN: set it to the domain")
