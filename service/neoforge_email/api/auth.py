"""API keys: who asks, from the `Authorization` header, with a small cache so that a request costs no query."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta

from neoforge_email.errors import Unauthorized

TTL = timedelta(seconds=30)  # a revoked key works that long at most
MOST = 10_000  # keys remembered in a process

_HEADER = re.compile(rb"[Bb]earer +(nf_[A-Za-z0-9_-]{43})")


class KeyRing:
    """The keys seen lately. `find` gives the user of a key's SHA-256, or None; only positive answers are kept."""

    def __init__(
        self, find: Callable[[bytes], Awaitable[int | None]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._find = find
        self._clock = clock
        self._known: dict[bytes, tuple[int, float]] = {}
        self._asked: dict[bytes, asyncio.Task[int | None]] = {}

    async def user_id(self, headers: Mapping[bytes, bytes]) -> int:
        """The user that the request acts for; raises Unauthorized, DatabaseUnavailable."""
        header = headers.get(b"authorization")
        if header is None:
            raise Unauthorized("Send the header `Authorization: Bearer nf_…` with an API key.")
        match = _HEADER.fullmatch(header)
        if match is None:
            raise Unauthorized(
                "The Authorization header must be `Bearer`, a space and an API key (nf_ and 43 characters)."
            )
        key_hash = hashlib.sha256(match[1]).digest()
        known = self._known.get(key_hash)
        if known is not None and known[1] > self._clock():
            return known[0]
        return await self._ask(key_hash)

    async def _ask(self, key_hash: bytes) -> int:
        # requests that come together share one query, and none of them can cancel it for the others
        task = self._asked.get(key_hash)
        if task is None:
            task = self._asked[key_hash] = asyncio.create_task(self._query(key_hash))
            task.add_done_callback(lambda _: self._asked.pop(key_hash, None))
        user_id = await asyncio.shield(task)
        if user_id is None:
            raise Unauthorized("This API key is unknown or revoked; `neoforge keys create` makes a new one.")
        return user_id

    async def _query(self, key_hash: bytes) -> int | None:
        user_id = await self._find(key_hash)
        self._known.pop(key_hash, None)
        if user_id is not None:
            while len(self._known) >= MOST:
                del self._known[next(iter(self._known))]
            self._known[key_hash] = (user_id, self._clock() + TTL.total_seconds())
        return user_id
