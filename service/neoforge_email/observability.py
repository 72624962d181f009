"""Metrics and logs. Every metric of the service is declared here, under the names of the deployment guide.

Logs are events with fields; no address, subject, body or secret goes into one.
"""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge, Histogram

from .settings import Settings

EMAILS_ACCEPTED = Counter("emails_accepted_total", "Messages committed to the queue", ["priority"])
EMAILS_SENT = Counter("emails_sent_total", "Recipients that a provider took", ["provider"])
EMAILS_FAILED = Counter("emails_failed_total", "Recipients that ended without being sent to", ["provider", "reason"])
EMAILS_DEFERRED = Counter("emails_deferred_total", "Recipients that will be tried again", ["provider"])
EMAILS_UNCERTAIN = Counter("emails_uncertain_total", "Messages whose attempt ended without an answer", ["provider"])
EMAILS_DUPLICATE = Counter("emails_duplicate_total", "Messages that more than one attempt was taken for", ["provider"])
EMAILS_LATE = Counter("emails_late_total", "Outcomes that came after their lease was lost", ["provider"])
PROVIDER_EVENTS = Counter("provider_events_total", "Events of providers that were recorded", ["provider", "type"])
PROVIDER_RECEIPTS = Counter(
    "provider_receipts_total",
    "What became of what providers told us: done, ignored, postponed, failed, unmatched, malformed",
    ["provider", "result"],
)
EMAIL_DELIVERY = Histogram(
    "email_delivery_seconds",
    "From acceptance until a provider took the message",
    ["provider"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 86400),
)
EMAIL_CLAIMED = Counter("email_claimed_total", "Messages leased by this worker", ["provider"])
EMAIL_IN_FLIGHT = Gauge("email_in_flight", "Messages leased by this worker now", ["provider"])
PROVIDER_UP = Gauge("email_provider_up", "The last call of the provider was answered", ["provider"])
PROVIDER_BREAKER_OPEN = Gauge(
    "email_provider_breaker_open", "The provider failed so often that this worker only probes it", ["provider"]
)
BOUNCES_RECEIVED = Counter("bounces_received_total", "Mails that came to the bounce listener", ["result"])
WEBHOOK_DELIVERIES = Counter(
    "webhook_deliveries_total", "Tries to deliver to a customer's endpoint: delivered, retried, dead, late", ["result"]
)
WEBHOOK_IN_FLIGHT = Gauge("webhook_in_flight", "Webhook deliveries leased by this worker now")
WEBHOOK_DELIVERY = Histogram(
    "webhook_delivery_seconds",
    "From an event until a customer's endpoint took it",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 86400, 259200),
)
DATABASE_ERRORS = Counter("database_errors_total", "Calls that failed because PostgreSQL was away", ["operation"])
DATABASE_READS = Counter("database_reads_total", "Look-ups, by the server that answered", ["server"])
DOORBELL_ERRORS = Counter("doorbell_errors_total", "Doorbells that could not be rung or heard")
HTTP_REQUESTS = Counter("http_requests_total", "Requests answered", ["method", "route", "status"])
HTTP_REQUEST_DURATION = Histogram(
    "http_request_duration_seconds",
    "From the first byte of a request to the last of its answer",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


def configure_logging(settings: Settings) -> None:
    """Send the service's events and the libraries' log records to standard error, in `LOG_FORMAT` from `LOG_LEVEL` up."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    )
    # Tracebacks without local variables: those hold addresses, bodies and keys.
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    level = logging.getLevelNamesMapping()[settings.log_level]
    structlog.configure(
        processors=[*shared, tracebacks, renderer] if settings.log_format == "json" else [*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
