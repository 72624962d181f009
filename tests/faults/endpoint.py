"""A customer's endpoint for webhooks, which can go away; and whether everything that was recorded has come to it."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from uuid import UUID, uuid4

import asyncpg
from aiohttp import web
from standardwebhooks import Webhook

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Endpoint:
    """Takes what is signed for it. `refuse` so many requests with 500."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.refuse = 0
        self.taken: dict[UUID, list[str]] = defaultdict(list)
        """The types of the events that came, each delivery once, by message."""
        self._seen: set[str] = set()
        self._runner: web.AppRunner | None = None

    async def register(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """For the only user there is."""
        await connection.execute(
            """with made as (
                   insert into webhook_endpoints (id, user_id, created_at, url, description, types)
                   select $1, id, now(), $2, '', '{}' from users returning id, user_id)
               insert into webhook_secrets (endpoint_id, user_id, created_at, secret) select id, user_id, now(), $3 from made""",
            uuid4(),
            f"http://127.0.0.1:{self.port}/",
            SECRET,
        )

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        if self.refuse > 0:
            self.refuse -= 1
            return web.Response(status=500)
        body = await request.text()
        Webhook(SECRET).verify(body, dict(request.headers))
        if request.headers["webhook-id"] not in self._seen:
            self._seen.add(request.headers["webhook-id"])
            event = json.loads(body)
            self.taken[UUID(event["data"]["email_id"])].append(event["type"])
        return web.Response()


async def untold(connection: asyncpg.Connection[asyncpg.Record], row: str) -> int:
    """How many events of the row's messages the service has not brought to the endpoint yet."""
    number: int = await connection.fetchval(
        """select count(*) from webhook_deliveries d join email_messages m on m.id = d.email_id
           where m.metadata->>'row' = $1 and d.state <> 'delivered'""",
        row,
    )
    return number


async def missing(connection: asyncpg.Connection[asyncpg.Record], row: str, endpoint: Endpoint) -> list[UUID]:
    """Messages of the row of which not every event has come to the endpoint."""
    recorded = await connection.fetch(
        """select e.email_id, array_agg('email.' || e.type::text) types
           from email_events e join email_messages m on m.id = e.email_id
           where m.metadata->>'row' = $1 group by 1""",
        row,
    )
    return [
        found["email_id"] for found in recorded if sorted(endpoint.taken[found["email_id"]]) != sorted(found["types"])
    ]
