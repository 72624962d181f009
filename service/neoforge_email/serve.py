"""`neoforge serve`: uvicorn with the guide's settings, and the metrics of all its processes on one port of the parent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import uvicorn

from . import db, outbox
from .errors import NeoforgeError, SettingsError
from .inbound import receipts
from .settings import Settings


def serve(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT. Requests under way are finished within GRACEFUL_SHUTDOWN_TIMEOUT."""
    with tempfile.TemporaryDirectory(prefix="neoforge-metrics-") as directory:
        # prometheus_client looks at this when it is first imported, here and in every process that uvicorn starts.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        # uvicorn ends by raising the signal again that stopped it, which by default would leave the directory behind.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if settings.enable_metrics:
            _serve_metrics(settings)
        uvicorn.run(
            "neoforge_email.app:create_app_from_environment",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.worker_processes,
            loop="uvloop",
            http="httptools",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=2048,
            limit_concurrency=settings.worker_connections,
            timeout_keep_alive=round(settings.keepalive_timeout.total_seconds()),
            timeout_graceful_shutdown=round(settings.graceful_shutdown_timeout.total_seconds()),
            proxy_headers=True,
            forwarded_allow_ips=settings.forwarded_allow_ips,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )


def _serve_metrics(settings: Settings) -> None:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(_Queue(settings))  # type: ignore[arg-type]
    try:
        start_http_server(settings.metrics_port, settings.metrics_host, registry)
    except OSError as error:
        raise SettingsError(
            f"METRICS_PORT: {settings.metrics_host}:{settings.metrics_port}: {error.strerror}"
        ) from None


class _Queue:
    """The queue's gauges, asked of the database when they are scraped: from the parent alone, not once a process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def describe(self) -> list[object]:
        """Nothing in advance: registering must not ask the database."""
        return []

    def collect(self) -> Iterator[object]:
        from prometheus_client.core import GaugeMetricFamily

        size = GaugeMetricFamily("email_queue_size", "Unfinished messages", labels=["state"])
        oldest = GaugeMetricFamily(
            "email_oldest_age_seconds", "Since the oldest message in this state was accepted", labels=["state"]
        )
        receipts_size = GaugeMetricFamily("provider_receipts_size", "Unfinished reports of providers", labels=["state"])
        receipts_oldest = GaugeMetricFamily(
            "provider_receipts_oldest_age_seconds", "Since the oldest report is in this state", labels=["state"]
        )
        up = GaugeMetricFamily("email_database_up", "PostgreSQL answered")
        try:
            messages, reports = asyncio.run(self._stats())
        except (NeoforgeError, *db.UNAVAILABLE):
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
            for stats, sizes, ages in ((messages, size, oldest), (reports, receipts_size, receipts_oldest)):
                for stat in stats:
                    sizes.add_metric([stat.state], stat.size)
                    ages.add_metric([stat.state], stat.oldest_seconds)
        yield from (size, oldest, receipts_size, receipts_oldest, up)

    async def _stats(self) -> tuple[list[outbox.QueueStat], list[outbox.QueueStat]]:
        connection = await db.connect(self._settings.database_url, "neoforge-metrics")
        try:
            return await outbox.queue_stats(connection), await receipts.stats(connection)
        finally:
            await connection.close()
