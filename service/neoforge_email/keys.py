"""API keys and the users they belong to, for the operator's command line; runs as neoforge_migrator.

A key is shown once, when it is made: only its SHA-256 is stored. It has 256 random bits, so a plain hash is enough.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from .db import Connection
from .errors import NotFound, ValidationFailed

_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SHOWN = 11  # characters of a key that are kept readable, to recognise it by


@dataclass(frozen=True, slots=True)
class Key:
    """A stored key; `prefix` is its beginning. Times are UTC."""

    id: int
    user: str
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


async def create(connection: Connection, user: str, name: str) -> tuple[Key, str]:
    """Make a key for a user, and the user if there is none of that name; returns it and its secret text.

    Raises ValidationFailed.
    """
    if not _USER.fullmatch(user):
        raise ValidationFailed(
            f"A user's name has 1 to 63 letters, digits, dots, dashes and underscores, not {user!r}."
        )
    if not 0 < len(name) <= 100 or not name.isprintable():
        raise ValidationFailed("A key's name has 1 to 100 printable characters.")
    secret = "nf_" + secrets.token_urlsafe(32)
    async with connection.transaction():
        await connection.execute("insert into users (name) values ($1) on conflict (name) do nothing", user)
        user_id = await connection.fetchval("select id from users where name = $1", user)
        row = await connection.fetchrow(
            "insert into api_keys (user_id, name, prefix, key_hash) values ($1, $2, $3, $4) returning id, created_at",
            user_id,
            name,
            secret[:SHOWN],
            hashlib.sha256(secret.encode()).digest(),
        )
    assert row is not None
    return Key(row["id"], user, name, secret[:SHOWN], row["created_at"], None, None), secret


async def list_all(connection: Connection, user: str | None = None) -> list[Key]:
    """Every key, of one user where a name is given, oldest first."""
    rows = await connection.fetch(
        "select k.id, u.name as user, k.name, k.prefix, k.created_at, k.last_used_at, k.revoked_at"
        " from api_keys k join users u on u.id = k.user_id where $1::text is null or u.name = $1 order by k.id",
        user,
    )
    return [Key(**dict(row)) for row in rows]


async def revoke(connection: Connection, key_id: int) -> Key:
    """Make a key useless; the API's processes forget it within auth.TTL. Raises NotFound. Twice is the same as once."""
    revoked = await connection.fetchval(
        "update api_keys set revoked_at = coalesce(revoked_at, clock()) where id = $1 returning id", key_id
    )
    if revoked is None:
        raise NotFound(f"There is no API key with the id {key_id}; `neoforge keys list` shows them.")
    return next(key for key in await list_all(connection) if key.id == key_id)
