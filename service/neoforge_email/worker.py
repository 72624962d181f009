"""The worker process: arq runs it, and it carries the delivery loop.

    arq neoforge_email.worker.WorkerSettings [--check] [--burst]

arq brings the process's life, its cron and its health check; the loop starts and ends with it. While Redis is away arq
ends, deliveries pause, and systemd brings the worker back. `WorkerSettings` is built when arq asks for it, never at import.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import structlog
import uvloop
from arq import cron
from arq.connections import ArqRedis, RedisSettings
from prometheus_client import start_http_server
from redis.asyncio import Redis
from redis.exceptions import RedisError

from . import db, outbox, providers, reconcile, webhooks
from .delivery import Delivery
from .errors import SettingsError
from .inbound import receipts
from .inbound.normaliser import Normaliser
from .observability import DOORBELL_ERRORS, configure_logging
from .redis import options
from .settings import Settings

log = structlog.get_logger()

JOBS_END_SECONDS = 5
PARTITIONS_AHEAD = 3
IDEMPOTENCY_KEYS_KEPT = timedelta(hours=24)
RECEIPTS_KEPT = timedelta(days=7)  # longer than any request is fresh, so that a replay is always recognised
UNDONE_RECEIPTS_KEPT = timedelta(days=90)
PROVIDER_MESSAGE_IDS_KEPT = timedelta(days=30)


class Loop(Protocol):
    """What works in the worker's process for as long as that lives."""

    async def run(self) -> None:
        """Work until `stop`."""

    def stop(self) -> None:
        """Begin nothing more; `run` returns when what is under way is finished."""

    def ring(self) -> None:
        """There may be something to do."""

    async def drained(self) -> None:
        """Wait until nothing is left to do."""


def __getattr__(name: str) -> Any:
    """`WorkerSettings`, from the environment as it is now. A bad setting ends the process with a line for each."""
    if name != "WorkerSettings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error.detail}\n")
        raise SystemExit(2) from None
    asyncio.set_event_loop(uvloop.new_event_loop())
    return worker_settings(settings, burst="--burst" in sys.argv)  # arq itself tells nobody


def worker_settings(settings: Settings, *, burst: bool = False) -> dict[str, Any]:
    """arq's settings as a plain mapping (from a class arq drops what is inherited)."""
    queue_name = f"{settings.email_queue_name}:jobs"
    return {
        "cron_jobs": [
            cron(ensure_partitions, minute=7, second=0, run_at_startup=True, keep_result=0),
            cron(expire, second=30, keep_result=0),
            cron(forget_idempotency_keys, minute={3, 33}, second=0, keep_result=0),
            cron(forget_webhooks, minute=13, second=0, keep_result=0),
            cron(reconcile_rows, second=45, keep_result=0),
            cron(forget_receipts, minute={13, 43}, second=0, keep_result=0),
        ],
        "ctx": {"settings": settings, "burst": burst},
        "on_startup": startup,
        "on_shutdown": shutdown,
        "redis_settings": redis_settings(settings),
        "redis_pool": _Pool(**options(settings), encoding="utf8", default_queue_name=queue_name),
        "queue_name": queue_name,
        "health_check_key": f"{settings.email_queue_name}:health:{settings.instance}",
        "health_check_interval": 5,
        "job_timeout": settings.email_worker_timeout.total_seconds(),
        # arq leaves on_shutdown out where SIGTERM cancels a job that is just ending: what is being sent would be uncertain.
        "job_completion_wait": JOBS_END_SECONDS,
        "max_tries": 1,
    }


def redis_settings(settings: Settings) -> RedisSettings:
    """The same for arq's `--check`, which makes a pool of its own; arq's default does not verify the peer's name."""
    url = settings.redis_url
    return RedisSettings(
        host=url.host,
        port=url.port,
        database=url.database,
        username=url.username,
        password=url.password,
        ssl=url.tls,
        ssl_ca_certs=url.ca_file,
        ssl_check_hostname=url.tls,
        conn_timeout=max(round(settings.redis_socket_connect_timeout.total_seconds()), 1),
        conn_retries=1,
    )


async def startup(ctx: dict[str, Any]) -> None:
    """Begin to deliver. Under `--burst`, deliver all that is due, and return when it is done."""
    settings: Settings = ctx["settings"]
    configure_logging(settings)
    logging.getLogger("arq").handlers.clear()
    ctx["pool"] = await db.create_pool(settings, settings.database_url, f"neoforge-worker {settings.instance}")
    ctx["provider"] = providers.create(settings)
    loops: list[Loop] = [
        Delivery(ctx["pool"], ctx["provider"], settings),
        Normaliser(ctx["pool"], settings),
        webhooks.Sender(ctx["pool"], settings),
    ]
    if settings.enable_metrics and settings.worker_instance:
        ctx["metrics"], _ = start_http_server(settings.metrics_port + settings.worker_instance, settings.metrics_host)
    ctx["loops"] = {loop: asyncio.create_task(loop.run(), name=type(loop).__name__) for loop in loops}
    for task in ctx["loops"].values():
        task.add_done_callback(_end_process_if_lost)
    ctx["doorbell"] = asyncio.create_task(_listen(ctx["redis"], settings.doorbell_channel, loops), name="doorbell")
    log.info("worker.started", instance=settings.instance, providers=settings.email_providers)
    if ctx["burst"]:
        for loop in loops:
            await loop.drained()


async def shutdown(ctx: dict[str, Any]) -> None:
    """Stop the loops within GRACEFUL_SHUTDOWN_TIMEOUT; what is not finished then is found by the sweep."""
    if "loops" not in ctx:
        return
    settings: Settings = ctx["settings"]
    ctx["doorbell"].cancel()
    for loop, task in ctx["loops"].items():
        task.remove_done_callback(_end_process_if_lost)
        loop.stop()
    try:
        async with asyncio.timeout(settings.graceful_shutdown_timeout.total_seconds()):
            await asyncio.gather(*ctx["loops"].values())
    except TimeoutError:
        log.warning("worker.stopped_late", instance=settings.instance)
    await ctx["provider"].close()
    ctx["pool"].terminate()
    if "metrics" in ctx:
        ctx["metrics"].shutdown()
    log.info("worker.stopped", instance=settings.instance)


async def ensure_partitions(ctx: dict[str, Any]) -> None:
    """Make the monthly partitions ahead, so that no acceptance ever meets a missing one."""
    for name in await outbox.ensure_partitions(ctx["pool"], PARTITIONS_AHEAD):
        log.info("partition.created", name=name)


async def expire(ctx: dict[str, Any]) -> None:
    """End messages that could not be sent before they expired, after the clock was followed if it was set back."""
    while count := await outbox.follow_clock(ctx["pool"]):
        log.warning("clock.was_set_back", messages=count)
    while count := await outbox.expire(ctx["pool"]):
        log.warning("email.expired", messages=count)


async def forget_idempotency_keys(ctx: dict[str, Any]) -> None:
    """Delete idempotency keys after their day."""
    while count := await outbox.forget_idempotency_keys(ctx["pool"], IDEMPOTENCY_KEYS_KEPT):
        log.info("idempotency_keys.forgotten", keys=count)


async def forget_receipts(ctx: dict[str, Any]) -> None:
    """Delete what providers told us, and what they called our messages, after its time."""
    while count := await receipts.forget(ctx["pool"], done=RECEIPTS_KEPT, other=UNDONE_RECEIPTS_KEPT):
        log.info("receipts.forgotten", receipts=count)
    while count := await receipts.forget_provider_message_ids(ctx["pool"], PROVIDER_MESSAGE_IDS_KEPT):
        log.info("provider_message_ids.forgotten", ids=count)


async def forget_webhooks(ctx: dict[str, Any]) -> None:
    """Delete what was delivered to customers' endpoints 30 days ago, and dead letters after 90."""
    while count := await webhooks.forget(ctx["pool"]):
        log.info("webhooks.forgotten", deliveries=count)


async def reconcile_rows(ctx: dict[str, Any]) -> None:
    """Look for rows that no rule will move again."""
    found = sorted(await reconcile.run(ctx["pool"]), key=lambda stuck: (stuck.kind, stuck.id))
    for kind, group in itertools.groupby(found, key=lambda stuck: stuck.kind):
        ids = [stuck.id for stuck in group]
        log.error("reconciler.found", kind=kind, count=len(ids), first_id=ids[0])


def _end_process_if_lost(task: asyncio.Task[None]) -> None:
    """Without one of its loops a worker only looks alive. End at once: the leases bring everything back."""
    log.critical("loop.lost", loop=task.get_name(), exc_info=None if task.cancelled() else task.exception())
    os._exit(70)


async def _listen(redis: Redis, channel: str, loops: Sequence[Loop]) -> None:
    """Hear the doorbell. While Redis cannot be heard the loops' own timers do."""
    while True:
        try:
            async with redis.pubsub() as pubsub:
                await pubsub.subscribe(channel)
                async for _ in pubsub.listen():  # the first is that we are subscribed
                    for loop in loops:
                        loop.ring()
        except (RedisError, OSError) as error:
            DOORBELL_ERRORS.inc()
            log.warning("doorbell.unheard", reason=type(error).__name__)
        await asyncio.sleep(1)


class _Pool(ArqRedis):
    """arq deletes its health key before it lets us finish; that Redis is away must not leave messages half sent."""

    async def delete(self, *names: Any) -> Any:
        try:
            return await super().delete(*names)
        except (RedisError, OSError):
            return 0
