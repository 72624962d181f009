"""The contract that all providers keep: memory, SMTP to the trial mailbox, and SendGrid to its double.

Those whose server takes more than that to start inherit the same tests in a file of their own.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta

import pytest

from neoforge_email.message import Message, Recipient
from neoforge_email.providers.base import Outcome, Result, Scope
from neoforge_email.providers.memory import TAKEN, MemoryProvider
from neoforge_email.providers.sendgrid import ATTEMPT, SendGridProvider
from neoforge_email.providers.smtp import SmtpProvider
from tests.provider_contract import Arrival, ProviderContract, Target, Trouble, Wire, WireContract
from tests.scripted_smtp import DROP, SILENCE, Action, ScriptedServer, scripted_server
from tests.sendgrid_double import Fault, sendgrid_double
from tests.support import Sink

NO_SUCH_USER = Result(Outcome.REFUSED, Scope.RECIPIENT, "550 no such user")
SOON = timedelta(seconds=1)

SMTP_TROUBLES: dict[Trouble, tuple[str, Action]] = {
    "silent": (r"\.", SILENCE),
    "silent after taking": (r"\.", SILENCE),
    "dropped after taking": (r"\.", DROP),
    "dropped in the body": ("BODY", DROP),
    "garbage": (r"\.", b"\xff\xfe\x00 this is no SMTP\r\n"),
    "throttled": ("MAIL.*", "421 4.7.0 too many messages"),
}

SENDGRID_TROUBLES: dict[Trouble, Fault] = {
    "silent": Fault("hang"),
    "silent after taking": Fault("hang", take=True),
    "dropped after taking": Fault("drop", take=True),
    "dropped in the body": Fault("drop_body"),
    "garbage": Fault("garbage", take=True),
    "throttled": Fault("throttle", seconds=2),
}


def nobody() -> int:
    """A port of the loopback interface where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class TestMemory(ProviderContract):
    @pytest.fixture
    async def target(self) -> Target:
        def answer(_: Message, recipient: Recipient) -> Result:
            return NO_SUCH_USER if recipient.mailbox.address.startswith("bad@") else TAKEN

        provider = MemoryProvider(window=3, connections=2, answer=answer)

        async def arrived(_: int) -> list[Arrival]:
            return [
                Arrival(one.message.attempt, frozenset(recipient.mailbox.address for recipient in one.recipients))
                for one in provider.taken
            ]

        def unreachable() -> MemoryProvider:
            other = MemoryProvider()
            other.unavailable = "nobody is there"
            return other

        return Target(provider, arrived, "bad@example.net", unreachable)


class TestSmtp(WireContract):
    @pytest.fixture
    async def target(self, sink: Sink) -> AsyncIterator[Target]:
        made: list[SmtpProvider] = []

        def make(port: int, timeout: timedelta = timedelta(seconds=5)) -> SmtpProvider:
            made.append(SmtpProvider("127.0.0.1", port, use_tls=False, window=3, connections=2, timeout=timeout))
            return made[-1]

        async def arrived(count: int) -> list[Arrival]:
            mails = await sink.store.wait(count) if count else []
            attempts = [re.search(rb"X-NeoForge-Attempt: (\S+)", mail.content) for mail in mails]
            return [
                Arrival(attempt[1].decode(), frozenset(mail.recipients))
                for mail, attempt in zip(mails, attempts, strict=True)
                if attempt
            ]

        async with AsyncExitStack() as servers:
            started: list[ScriptedServer] = []

            async def troubled(trouble: Trouble) -> SmtpProvider:
                what, action = SMTP_TROUBLES[trouble]
                friendly: Action = "250 ok"
                server = await servers.enter_async_context(scripted_server({what: (action, friendly)}))
                started.append(server)
                return make(server.port, SOON)

            yield Target(
                make(sink.port),
                arrived,
                "smtp-550@example.com",
                lambda: make(nobody()),
                Wire(troubled, lambda: bool(started[-1].bodies), sink.port, says_when=False),
            )
            for one in made:
                await one.close()


class TestSendGrid(WireContract):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        made: list[SendGridProvider] = []
        async with sendgrid_double(invalid={"bad@example.net"}) as double:

            def make(port: int, timeout: timedelta = timedelta(seconds=5)) -> SendGridProvider:
                url = f"http://127.0.0.1:{port}"
                made.append(SendGridProvider(double.key, url=url, timeout=timeout, connections=2))
                return made[-1]

            async def arrived(_: int) -> list[Arrival]:
                return [Arrival(one.custom_args[ATTEMPT], frozenset(one.recipients)) for one in double.taken]

            async def troubled(trouble: Trouble) -> SendGridProvider:
                double.faults.append(replace(SENDGRID_TROUBLES[trouble]))
                return make(double.port, SOON)

            yield Target(
                make(double.port),
                arrived,
                "bad@example.net",
                lambda: make(nobody()),
                Wire(troubled, lambda: not double.faults, double.port, secrets=(double.key,)),
            )
            for one in made:
                await one.close()
