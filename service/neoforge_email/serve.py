"""`neoforge serve`: uvicorn with the guide's settings, and the metrics of all its processes on one port of the parent."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator

import uvicorn

from . import backlog, db
from .errors import NeoforgeError, SettingsError
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
            ssl_context_factory=_modern if settings.ssl_certfile else None,
        )


def _modern(_: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """TLS 1.3 with one curve: who asks the service itself, and not the edge, is of the fleet."""
    context = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_ecdh_curve("prime256v1")
    return context


def _serve_metrics(settings: Settings) -> None:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(_Backlog(settings))  # type: ignore[arg-type]
    try:
        start_http_server(settings.metrics_port, settings.metrics_host, registry)
    except OSError as error:
        raise SettingsError(
            f"METRICS_PORT: {settings.metrics_host}:{settings.metrics_port}: {error.strerror}"
        ) from None


class _Backlog:
    """What waits and what is stuck, asked of the database when it is scraped: from the parent alone, not once a process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def describe(self) -> list[object]:
        """Nothing in advance: registering must not ask the database."""
        return []

    def collect(self) -> Iterator[object]:
        from prometheus_client.core import GaugeMetricFamily

        up = GaugeMetricFamily("email_database_up", "PostgreSQL answered")
        try:
            read = asyncio.run(self._read())
        except (NeoforgeError, *db.UNAVAILABLE):
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        for what, (size_name, age_name, of) in GAUGES.items():
            size = GaugeMetricFamily(size_name, of, labels=["state"])
            oldest = GaugeMetricFamily(age_name, f"Age of the oldest: {of}", labels=["state"])
            for waiting in read.waiting:
                if waiting.what == what:
                    size.add_metric([waiting.state], waiting.size)
                    oldest.add_metric([waiting.state], waiting.oldest_seconds)
            yield from (size, oldest)
        stuck = GaugeMetricFamily("reconciler_stuck_rows", "Rows that no rule will move again", labels=["kind"])
        for kind, count in read.stuck.items():
            stuck.add_metric([kind], count)
        yield stuck
        yield GaugeMetricFamily(
            "reconciler_last_success_timestamp_seconds",
            "When the reconciler last did all of its work",
            value=read.reconciled_at.timestamp(),
        )
        yield GaugeMetricFamily(
            "email_partitions_end_timestamp_seconds",
            "When the first table has no partition any more",
            value=read.partitions_end.timestamp(),
        )

        if read.replicated is not None:
            yield GaugeMetricFamily(
                "database_replication_degraded",
                "Commits wait for no replica: none streams, and what is accepted lies on one machine",
                value=not read.replicated,
            )

    async def _read(self) -> backlog.Backlog:
        connection = await db.connect(self._settings.database_url, "neoforge-metrics")
        try:
            return await backlog.read(connection)
        finally:
            await connection.close(timeout=1)


GAUGES = {
    "queue": ("email_queue_size", "email_oldest_age_seconds", "Unfinished messages, by acceptance"),
    "receipts": ("provider_receipts_size", "provider_receipts_oldest_age_seconds", "Reports of providers"),
    "webhooks": ("webhook_queue_size", "webhook_oldest_age_seconds", "Deliveries to customers' endpoints"),
}
