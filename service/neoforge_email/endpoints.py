"""Customers' webhook endpoints as their owners see and change them: the SQL behind `/webhook-endpoints`.

Every function acts for one user and sees that user's rows only. A secret leaves the database by the sender alone; here it is
made, stored, and returned once. All raise DatabaseUnavailable, and NotFound for an endpoint that the user does not have.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
import msgspec

from .db import Connection, Pool, read_session, write_session
from .errors import NeoforgeError, NotFound
from .lifecycle import EventType
from .outbox import EPOCH
from .webhooks import FAILING, webhook_id

MOST_ENDPOINTS = 20  # a user
EVENTS_SHOWN = 50
COUNTED = 10_000  # deliveries of a state; beyond, it is that many at least
REPLAYED = 10_000  # deliveries a call
REPLAYED_IDS = 1000
PAGE = 100  # deliveries, at most
URL_CHARACTERS = 2000
DESCRIPTION_CHARACTERS = 500
SECRET_BYTES = 32
OLD_SECRET_SIGNS = timedelta(hours=24)

TYPES = frozenset({*(f"email.{event.value}" for event in EventType), "webhook.disabled"})
"""What an endpoint may choose from; a `webhook.test` is sent whatever it chose."""

State = Literal["pending", "leased", "delivered", "dead"]
STATES: tuple[State, ...] = ("pending", "leased", "delivered", "dead")


class TooManyEndpoints(NeoforgeError):
    status = 409
    type = "too-many-endpoints"
    title = "There are as many webhook endpoints as a user may have"


class EndpointDisabled(NeoforgeError):
    status = 409
    type = "endpoint-disabled"
    title = "The webhook endpoint is disabled"


def _about(description: str, example: Any, **bounds: Any) -> msgspec.Meta:
    return msgspec.Meta(description=description, examples=[example], **bounds)


class EndpointRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Where events go, and which of them."""

    url: Annotated[
        str,
        _about(
            "Where to POST: https, and public on the internet.",
            "https://shop.example.com/webhooks",
            max_length=URL_CHARACTERS,
        ),
    ]
    description: Annotated[str, _about("For you alone.", "order desk", max_length=DESCRIPTION_CHARACTERS)] = ""
    types: Annotated[
        list[str], _about("The event types to send, such as `email.bounce`; empty: all.", ["email.bounce"])
    ] = []


class Endpoint(msgspec.Struct, kw_only=True):
    """`failing`: its last tries failed, so it is sent one event at a time, the next one not before `next_try`. `disabled`:
    it is sent nothing, until you enable it."""

    id: UUID
    url: str
    description: str
    types: list[str]
    created_at: datetime
    state: Literal["ok", "failing", "disabled"]
    failing_since: datetime | None
    next_try: datetime | None
    disabled_at: datetime | None
    disabled_reason: str | None


class EndpointWithSecret(Endpoint, kw_only=True):
    """`secret` verifies the signatures. It is shown this once and cannot be read again."""

    secret: str


class EndpointEvent(msgspec.Struct, kw_only=True):
    """What happened to an endpoint."""

    at: datetime
    type: Literal["created", "changed", "secret_rotated", "failing", "recovered", "disabled", "enabled"]
    detail: str | None


class EndpointDetail(Endpoint, kw_only=True):
    """`deliveries` counts them by state (10000: that many or more); `events` are the newest, newest first."""

    deliveries: dict[State, int]
    events: list[EndpointEvent]


class Delivery(msgspec.Struct, kw_only=True):
    """One event on its way to an endpoint. `id` is its `webhook-id`; `status` and `answer` are of the last try."""

    id: str
    type: str
    email_id: UUID | None
    state: State
    created_at: datetime
    due: datetime | None
    tries: int
    status: int | None
    answer: str | None
    finished_at: datetime | None
    payload: dict[str, Any]


class Deliveries(msgspec.Struct, kw_only=True):
    """Newest first. `next` is the `after` of the following page; null: there is none."""

    deliveries: list[Delivery]
    next: str | None


class Replayed(msgspec.Struct, kw_only=True):
    """`replayed` were queued again under the same ids. `more_from` is the `from` to go on with; null: that was all."""

    replayed: int
    more_from: datetime | None


_ENDPOINT = """
select id, url, description, types, created_at, failing_since, paused_until, disabled_at, disabled_reason, failures
from webhook_endpoints
"""


def _endpoint(row: asyncpg.Record) -> dict[str, Any]:
    failing = row["failures"] >= FAILING
    return {
        "id": row["id"],
        "url": row["url"],
        "description": row["description"],
        "types": row["types"],
        "created_at": row["created_at"],
        "state": "disabled" if row["disabled_at"] else "failing" if failing else "ok",
        "failing_since": row["failing_since"] if failing else None,
        "next_try": row["paused_until"],
        "disabled_at": row["disabled_at"],
        "disabled_reason": row["disabled_reason"],
    }


async def create(pool: Pool, user_id: int, request: EndpointRequest) -> EndpointWithSecret:
    """A new endpoint with its secret. Raises TooManyEndpoints."""
    secret = _new_secret()
    async with write_session(pool, user_id) as connection:
        await connection.execute("select pg_advisory_xact_lock(hashtext('webhook_endpoints'), $1)", user_id)
        if await connection.fetchval("select count(*) from webhook_endpoints") >= MOST_ENDPOINTS:
            raise TooManyEndpoints(f"Delete one: a user may have {MOST_ENDPOINTS}.")
        endpoint_id = await connection.fetchval(
            "insert into webhook_endpoints (id, user_id, created_at, url, description, types)"
            " values (uuid7(clock()), $1, clock(), $2, $3, $4) returning id",
            user_id,
            request.url,
            request.description,
            request.types,
        )
        await _add_secret(connection, user_id, endpoint_id, secret)
        await _tell(connection, user_id, endpoint_id, "created")
        return EndpointWithSecret(**_endpoint(await _find(connection, endpoint_id)), secret=secret)


async def list_all(pool: Pool, user_id: int) -> list[Endpoint]:
    async with read_session(pool, user_id) as connection:
        rows = await connection.fetch(f"{_ENDPOINT} order by id")
    return [Endpoint(**_endpoint(row)) for row in rows]


async def get(pool: Pool, user_id: int, endpoint_id: UUID) -> EndpointDetail:
    async with read_session(pool, user_id) as connection:
        row = await _find(connection, endpoint_id)
        counts = await connection.fetch(_COUNTS, endpoint_id, list(STATES), COUNTED)
        events = await connection.fetch(_EVENTS, endpoint_id, EVENTS_SHOWN)
    return EndpointDetail(
        **_endpoint(row),
        deliveries={count["state"]: count["size"] for count in counts},
        events=[EndpointEvent(at=event["at"], type=event["type"], detail=event["detail"]) for event in events],
    )


# Index: webhook_deliveries_listed.
_COUNTS = """
select s.state, (select count(*) from (
    select from webhook_deliveries d where d.endpoint_id = $1 and d.state = s.state::webhook_state limit $3) x) as size
from unnest($2::text[]) s(state)
"""
_EVENTS = """
select at, type::text as type, detail from webhook_endpoint_events where endpoint_id = $1 order by id desc limit $2
"""


async def change(pool: Pool, user_id: int, endpoint_id: UUID, request: EndpointRequest) -> Endpoint:
    """Give an endpoint another URL, description or choice of types. Under a new URL it is tried at once."""
    async with write_session(pool, user_id) as connection:
        row = await _find(connection, endpoint_id, lock=True)
        await connection.execute(
            "update webhook_endpoints set url = $2, description = $3, types = $4 where id = $1",
            endpoint_id,
            request.url,
            request.description,
            request.types,
        )
        if row["url"] != request.url:
            await _tell(connection, user_id, endpoint_id, "changed", f"its URL was {row['url']}")
            await _try_at_once(connection, endpoint_id)
        return Endpoint(**_endpoint(await _find(connection, endpoint_id)))


async def delete(pool: Pool, user_id: int, endpoint_id: UUID) -> None:
    """Delete an endpoint; the sender takes away what was queued for it."""
    async with write_session(pool, user_id) as connection:
        await _find(connection, endpoint_id, lock=True)
        await connection.execute("delete from webhook_endpoints where id = $1", endpoint_id)


async def rotate_secret(pool: Pool, user_id: int, endpoint_id: UUID) -> EndpointWithSecret:
    """A new secret. The present one signs beside it for another 24 hours; one before that, no more."""
    secret = _new_secret()
    async with write_session(pool, user_id) as connection:
        row = await _find(connection, endpoint_id, lock=True)
        await connection.execute(
            "delete from webhook_secrets where endpoint_id = $1 and expires_at is not null", endpoint_id
        )
        await connection.execute(
            "update webhook_secrets set expires_at = clock() + $2 where endpoint_id = $1", endpoint_id, OLD_SECRET_SIGNS
        )
        await _add_secret(connection, user_id, endpoint_id, secret)
        await _tell(connection, user_id, endpoint_id, "secret_rotated")
        return EndpointWithSecret(**_endpoint(row), secret=secret)


async def enable(pool: Pool, user_id: int, endpoint_id: UUID) -> Endpoint:
    """Enable a disabled endpoint; any other one is just tried at once."""
    async with write_session(pool, user_id) as connection:
        row = await _find(connection, endpoint_id, lock=True)
        if row["disabled_at"]:
            await _tell(connection, user_id, endpoint_id, "enabled")
            await connection.execute(
                "update webhook_endpoints set disabled_at = null, disabled_reason = null where id = $1", endpoint_id
            )
        await _try_at_once(connection, endpoint_id)
        return Endpoint(**_endpoint(await _find(connection, endpoint_id)))


async def test(pool: Pool, user_id: int, endpoint_id: UUID) -> str:
    """Queue a `webhook.test`, which a failing endpoint gets at once; returns its webhook-id. Raises EndpointDisabled."""
    async with write_session(pool, user_id) as connection:
        await _find(connection, endpoint_id, lock=True, enabled=True)
        await connection.execute("update webhook_endpoints set paused_until = null where id = $1", endpoint_id)
        delivery_id: UUID = await connection.fetchval(_TEST, endpoint_id, user_id)
    return webhook_id(delivery_id)


_TEST = """
insert into webhook_deliveries (id, endpoint_id, created_at, due, user_id, state, type, payload)
values (uuid7(clock()), $1::uuid, clock(), clock(), $2, 'pending', 'webhook.test', jsonb_build_object(
    'type', 'webhook.test', 'timestamp', webhook_time(clock()), 'data', jsonb_build_object('endpoint_id', $1::uuid)))
returning id
"""


async def deliveries(
    pool: Pool, user_id: int, endpoint_id: UUID, states: Sequence[State], after: UUID | None, limit: int
) -> Deliveries:
    """A page of an endpoint's deliveries in these states, newest first, below the id `after`."""
    async with read_session(pool, user_id) as connection:
        await _find(connection, endpoint_id)
        rows = await connection.fetch(_DELIVERIES, endpoint_id, list(states), after or UUID(int=2**128 - 1), limit)
    found = [
        Delivery(
            id=webhook_id(row["id"]),
            type=row["type"],
            email_id=row["email_id"],
            state=row["state"],
            created_at=row["created_at"],
            due=row["due"] if row["state"] == "pending" else None,
            tries=row["tries"],
            status=row["status"],
            answer=row["answer"],
            finished_at=row["finished_at"],
            payload=msgspec.json.decode(row["payload"]),
        )
        for row in rows
    ]
    return Deliveries(deliveries=found, next=found[-1].id if len(found) == limit else None)


# Index: webhook_deliveries_listed, once a state.
_DELIVERIES = """
select d.* from unnest($2::text[]) s(state) cross join lateral (
    select id, type, email_id, state::text as state, created_at, due, tries, status, answer, finished_at, payload::text as payload
    from webhook_deliveries
    where endpoint_id = $1 and webhook_deliveries.state = s.state::webhook_state and id < $3 order by id desc limit $4) d
order by d.id desc limit $4
"""


async def replay_ids(pool: Pool, user_id: int, endpoint_id: UUID, ids: Sequence[UUID]) -> Replayed:
    """Send these again, as far as they are delivered or dead. Raises EndpointDisabled."""
    async with write_session(pool, user_id) as connection:
        await _find(connection, endpoint_id, lock=True, enabled=True)
        rows = await connection.fetch(_REPLAY, endpoint_id, list(ids))
    return Replayed(replayed=len(rows), more_from=None)


async def replay_range(pool: Pool, user_id: int, endpoint_id: UUID, begin: datetime, end: datetime) -> Replayed:
    """Send again what is delivered or dead and was queued from `begin` to `end`, the oldest 10,000. Raises EndpointDisabled."""
    async with write_session(pool, user_id) as connection:
        await _find(connection, endpoint_id, lock=True, enabled=True)
        first, beyond = _lowest_id(begin), _lowest_id(end + timedelta(milliseconds=1))
        ids = [row["id"] for row in await connection.fetch(_RANGE, endpoint_id, first, beyond, REPLAYED)]
        rows = await connection.fetch(_REPLAY, endpoint_id, ids)
    more_from = EPOCH + timedelta(milliseconds=ids[-1].int >> 80) if len(ids) == REPLAYED else None
    return Replayed(replayed=len(rows), more_from=more_from)


_RANGE = """
select d.id from unnest('{delivered,dead}'::webhook_state[]) s(state) cross join lateral (
    select id from webhook_deliveries
    where endpoint_id = $1 and webhook_deliveries.state = s.state and id >= $2 and id < $3 order by id limit $4) d
order by d.id limit $4
"""
# its lease's number moves on, so that an answer to an earlier call does not count for this one
_REPLAY = """
update webhook_deliveries
set state = 'pending', due = clock(), tries = 0, lease_no = lease_no + 1, expires_at = null, finished_at = null
where endpoint_id = $1 and id = any($2) and state in ('delivered', 'dead')
returning id
"""


def parse_webhook_id(text: str) -> UUID | None:
    """The delivery that a webhook-id names, or None for anything else."""
    return UUID(text[4:]) if re.fullmatch(r"msg_[0-9a-f]{32}", text) else None


def _lowest_id(at: datetime) -> UUID:
    """What no id of this millisecond lies below, and every earlier one does."""
    milliseconds = (at - EPOCH) // timedelta(milliseconds=1)
    return UUID(int=min(max(milliseconds, 0), 2**48 - 1) << 80)


async def _find(
    connection: Connection, endpoint_id: UUID, *, lock: bool = False, enabled: bool = False
) -> asyncpg.Record:
    """The endpoint's row, locked before its deliveries as the sender does it. Raises NotFound, EndpointDisabled."""
    row = await connection.fetchrow(f"{_ENDPOINT} where id = $1 {'for update' if lock else ''}", endpoint_id)
    if row is None:
        raise NotFound(f"There is no webhook endpoint {endpoint_id} among yours.")
    if enabled and row["disabled_at"]:
        raise EndpointDisabled("Enable the endpoint first; nothing was queued.")
    return row


async def _try_at_once(connection: Connection, endpoint_id: UUID) -> None:
    await connection.execute(
        "update webhook_endpoints set failures = 0, failing_since = null, failed_at = null, paused_until = null where id = $1",
        endpoint_id,
    )
    await connection.execute(
        "update webhook_deliveries set due = clock() where endpoint_id = $1 and state = 'pending' and due > clock()",
        endpoint_id,
    )


async def _add_secret(connection: Connection, user_id: int, endpoint_id: UUID, secret: str) -> None:
    await connection.execute(
        "insert into webhook_secrets (endpoint_id, user_id, created_at, secret) values ($1, $2, clock(), $3)",
        endpoint_id,
        user_id,
        secret,
    )


async def _tell(connection: Connection, user_id: int, endpoint_id: UUID, kind: str, detail: str | None = None) -> None:
    await connection.execute(
        "insert into webhook_endpoint_events (endpoint_id, user_id, at, type, detail)"
        " values ($1, $2, clock(), $3::webhook_endpoint_event_type, $4)",
        endpoint_id,
        user_id,
        kind,
        detail,
    )


def _new_secret() -> str:
    """A symmetric secret as Standard Webhooks writes it: `whsec_` and 24 to 64 random bytes in base64."""
    return "whsec_" + base64.b64encode(os.urandom(SECRET_BYTES)).decode()
