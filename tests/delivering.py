"""An intake, a delivery loop and providers over one database: what a test of delivery runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from neoforge_email import db
from neoforge_email.delivery import Delivery
from neoforge_email.message import Draft, Kind, Mailbox
from neoforge_email.outbox import Intake
from neoforge_email.providers.base import Provider
from neoforge_email.providers.router import Router
from neoforge_email.redis import connect
from neoforge_email.settings import Settings
from tests.support import Database


class System:
    """A running system with its first provider; `superuser` sees what it leaves in the database."""

    def __init__(
        self, intake: Intake, delivery: Delivery, router: Router, pool: db.Pool, superuser: db.Connection
    ) -> None:
        self.intake = intake
        self.delivery = delivery
        self.router = router
        self.provider: Any = router.providers[0]
        self.pool = pool
        self.superuser = superuser

    async def send(self, count: int = 1, **changes: Any) -> None:
        await asyncio.gather(*(self.intake.accept(a_draft(f"{n}@example.net", **changes)) for n in range(count)))

    async def statuses(self) -> dict[str, int]:
        return await self._counts("select status::text, count(*) from email_tracking group by 1")

    async def queue(self) -> dict[str, int]:
        return await self._counts("select state::text, count(*) from email_queue group by 1")

    async def events(self) -> dict[str, int]:
        return await self._counts("select type::text, count(*) from email_events group by 1")

    async def _counts(self, query: str) -> dict[str, int]:
        return {row[0]: row[1] for row in await self.superuser.fetch(query)}

    async def until(self, reached: Callable[[], Any], seconds: float = 10) -> None:
        async with asyncio.timeout(seconds):
            while not await reached():
                await asyncio.sleep(0.02)

    async def is_empty(self) -> bool:
        return not await self.queue()


def a_draft(recipient: str, **changes: Any) -> Draft:
    values: dict[str, Any] = {
        "user_id": 1,
        "lane": 2,
        "sender": Mailbox("shop@example.com"),
        "reply_to": None,
        "subject": "Your order",
        "headers": {},
        "tags": [],
        "metadata": {},
        "html": None,
        "text": "It has left.",
        "recipients": [(Kind.TO, Mailbox(recipient))],
        "idempotency_key": None,
        "body_hash": b"",
    }
    return Draft(**{**values, **changes})


@asynccontextmanager
async def delivering(
    database: Database, make_settings: Callable[..., Settings], providers: Sequence[Provider], **variables: str
) -> AsyncIterator[System]:
    """A running system that is stopped at the end."""
    api, worker = make_settings("api", **variables), make_settings("worker", **variables)
    superuser = await db.connect(Database.url(database.superuser), "test")
    await superuser.execute("insert into users (name) values ('shop') on conflict do nothing")
    async with (
        await db.create_pool(api, api.database_url, "test-api") as pool,
        await db.create_pool(worker, worker.database_url, "test-worker") as worker_pool,
    ):
        router = Router.of(providers, worker, connect(worker))
        delivery = Delivery(worker_pool, router, worker)
        intake = Intake(pool, expire_after=timedelta(hours=24), on_commit=delivery.ring)
        await intake.start()
        running = asyncio.create_task(delivery.run())
        try:
            yield System(intake, delivery, router, worker_pool, superuser)
        finally:
            delivery.stop()
            await running
            await router.close()
            await intake.close()
    await superuser.close()
