"""What the tests of customers' webhooks share: messages with events, endpoints, senders, and a clock to step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
from standardwebhooks import Webhook

from neoforge_email import db, endpoints, outbox
from neoforge_email.db import Pool
from neoforge_email.endpoints import EndpointRequest, EndpointWithSecret
from neoforge_email.inbound import Event
from neoforge_email.lifecycle import EventType
from neoforge_email.message import Draft, Kind, Mailbox
from neoforge_email.outbox import Intake
from neoforge_email.settings import Settings
from neoforge_email.webhooks import Sender
from tests.receiver import Received
from tests.support import Database

SHOP, OTHER = 1, 2
VARIABLES = {
    "WEBHOOK_ALLOW_HTTP": "true",
    "WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
    "WEBHOOK_TIMEOUT": "5",
    "EMAIL_WORKER_INTERVAL": "0.05",
}


@dataclass
class Yard:
    """A database with two users, as the API, the worker and its superuser reach it."""

    database: Database
    make_settings: Callable[..., Settings]
    api: Pool
    worker: Pool
    superuser: db.Connection
    intake: Intake
    offset: timedelta = field(default_factory=timedelta)

    def settings(self, **variables: str) -> Settings:
        return self.make_settings("worker", **{**VARIABLES, **variables})

    async def endpoint(self, url: str, *types: str, user_id: int = SHOP) -> EndpointWithSecret:
        return await endpoints.create(self.api, user_id, EndpointRequest(url=url, types=list(types)))

    async def message(self, *recipients: str, user_id: int = SHOP, **changes: Any) -> UUID:
        draft = Draft(
            user_id=user_id,
            lane=2,
            sender=Mailbox("shop@example.com"),
            reply_to=None,
            subject="Your order",
            headers={},
            tags=changes.pop("tags", []),
            metadata=changes.pop("metadata", {}),
            html=None,
            text="It has left.",
            recipients=[(Kind.TO, Mailbox(recipient)) for recipient in recipients or ("ada@example.net",)],
            idempotency_key=None,
            body_hash=b"",
        )
        return (await self.intake.accept(draft)).id

    async def report(self, email_id: UUID, *types: str, recipient: str | None = None, **changes: Any) -> None:
        """Record what a provider reports about a message, in this order, in one transaction."""
        values: dict[str, Any] = {
            "provider": "sendgrid",
            "recipient": recipient,
            "occurred_at": datetime.now(UTC),
            **changes,
        }
        await self.report_all([(email_id, kind) for kind in types], **values)

    async def report_all(self, facts: Sequence[tuple[UUID, str]], **changes: Any) -> None:
        """Record an event of a type about each of these messages, in one transaction."""
        values: dict[str, Any] = {"provider": "sendgrid", "occurred_at": datetime.now(UTC), **changes}
        events = [
            Event(event_id=uuid4().hex, type=EventType(kind), attempt=f"{email_id.hex}-1", **values)
            for email_id, kind in facts
        ]
        async with self.worker.acquire() as connection, connection.transaction():
            recorded = await outbox.record_events(connection, events)  # type: ignore[arg-type]
        assert all(recorded.matched)

    @asynccontextmanager
    async def sender(self, **variables: str) -> AsyncIterator[Sender]:
        """A running sender, stopped at the end."""
        sender = Sender(self.worker, self.settings(**variables))
        running = asyncio.create_task(sender.run())
        try:
            yield sender
        finally:
            sender.stop()
            await running

    async def drain(self, **variables: str) -> None:
        """Run a sender until nothing is due."""
        async with self.sender(**variables) as sender:
            await sender.drained()

    async def step(self, by: timedelta) -> None:
        """Let the database's clock go on, for every connection that is used from now on."""
        self.offset += by
        seconds = self.offset.total_seconds()
        await self.superuser.execute(f"alter database {self.database.name} set app.clock_offset = '{seconds} seconds'")
        await self.superuser.execute(f"set app.clock_offset = '{seconds} seconds'")
        await self.api.expire_connections()
        await self.worker.expire_connections()

    async def deliveries(self, *columns: str) -> list[Any]:
        """Of each delivery, in the order of their numbers, these columns, or its only one."""
        wanted = ", ".join(
            f"{column}::text as {column}" if column in {"state", "payload"} else column for column in columns
        )
        rows = await self.superuser.fetch(f"select {wanted} from webhook_deliveries order by number")
        return [row[0] if len(columns) == 1 else tuple(row) for row in rows]

    async def states(self) -> dict[str, int]:
        rows = await self.superuser.fetch("select state::text as state, count(*) from webhook_deliveries group by 1")
        return {row["state"]: row["count"] for row in rows}

    async def happened(self, endpoint_id: UUID, user_id: int = SHOP) -> list[str]:
        """What the owner sees of an endpoint's life, oldest first."""
        detail = await endpoints.get(self.api, user_id, endpoint_id)
        return [event.type for event in reversed(detail.events)]


async def until(reached: Callable[[], Any], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.01)


def verified(request: Received, *secrets: str) -> dict[str, Any]:
    """The payload of a request that the reference library verifies with each of these secrets."""
    found: dict[str, Any] = {}
    for secret in secrets:
        found = Webhook(secret).verify(request.body, request.headers)
    return found


def told(requests: Sequence[Received]) -> dict[str, list[str]]:
    """By message, the types of events in the order in which they came."""
    by_message: dict[str, list[str]] = {}
    for request in requests:
        payload = msgspec.json.decode(request.body)
        by_message.setdefault(payload["data"]["email_id"], []).append(payload["type"].removeprefix("email."))
    return by_message
