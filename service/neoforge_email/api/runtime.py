"""What a process of the API holds while it runs: pools, the intake, the doorbell, the keys seen lately."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from litestar import Litestar
from redis.asyncio import Redis

from neoforge_email import observability, records
from neoforge_email.db import UNAVAILABLE, Pool, create_pool
from neoforge_email.doorbell import Doorbell
from neoforge_email.egress import Egress
from neoforge_email.errors import DatabaseUnavailable
from neoforge_email.outbox import Intake
from neoforge_email.redis import connect
from neoforge_email.replica import Readers, close
from neoforge_email.settings import Settings

from .auth import KeyRing
from .submission import Rules


@dataclass(frozen=True, slots=True)
class Runtime:
    """Made by `run` when the process starts."""

    settings: Settings
    rules: Rules
    pool: Pool
    readers: Readers
    redis: Redis
    doorbell: Doorbell
    intake: Intake
    keys: KeyRing
    egress: Egress

    async def get_email(self, user_id: int, email_id: UUID) -> records.Email | None:
        """The user's message of that id, or None. Raises DatabaseUnavailable."""
        lanes, max_retries = self.settings.lanes, self.settings.email_worker_max_retries
        return await self.readers.look_up(
            lambda pool: records.get_email(pool, user_id, email_id, lanes, max_retries=max_retries)
        )


def _finder(pool: Pool) -> Callable[[bytes], Awaitable[int | None]]:
    """Looks up the user of an API key's SHA-256. Raises DatabaseUnavailable."""

    async def find(key_hash: bytes) -> int | None:
        try:
            user_id: int | None = await pool.fetchval("select user_id from find_api_key($1)", key_hash)
        except UNAVAILABLE as error:
            raise DatabaseUnavailable("The database cannot be reached; nothing was accepted") from error
        return user_id

    return find


class Slot:
    """Where the handlers find the runtime: empty until the application's life begins."""

    runtime: Runtime

    @asynccontextmanager
    async def fill(self, settings: Settings) -> AsyncIterator[None]:
        """Start everything; on the way out flush what was accepted, ring the bell for it, and close."""
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(await create_pool(settings, settings.database_url, "neoforge-api"))
            replica = None
            if settings.database_read_url != settings.database_url:
                replica = await create_pool(settings, settings.database_read_url, "neoforge-api-read")
                stack.push_async_callback(close, replica)
            redis = connect(settings)
            stack.push_async_callback(redis.aclose)
            doorbell = Doorbell(redis, settings.doorbell_channel, observability.DOORBELL_ERRORS.inc)
            doorbell.start()
            stack.push_async_callback(doorbell.close)
            intake = Intake(pool, expire_after=settings.email_expire_hours, on_commit=doorbell.ring)
            await intake.start()
            stack.push_async_callback(intake.close)
            self.runtime = Runtime(
                settings,
                Rules.of(settings),
                pool,
                Readers(pool, replica),
                redis,
                doorbell,
                intake,
                KeyRing(_finder(pool)),
                await stack.enter_async_context(Egress.of(settings)),
            )
            yield

    def lifespan(self, settings: Settings) -> Callable[[Litestar], AbstractAsyncContextManager[None]]:
        """For Litestar's `lifespan=`."""

        @asynccontextmanager
        async def manager(_: Litestar) -> AsyncIterator[None]:
            async with self.fill(settings):
                yield

        return manager
