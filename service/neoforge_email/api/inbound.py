"""Where providers report what became of messages. No API key: each request has to prove by its signature where it is from.

What is proved is stored as it came, before the answer; the worker makes events of it. An answer other than a 2xx makes the
provider send it again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, cast

import msgspec
import structlog
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.params import HeaderParameter

from neoforge_email.errors import BodyTooLarge, MalformedBody, NotFound, SignatureRefused, Unavailable
from neoforge_email.inbound import receipts, sendgrid, sns

from . import problems
from .runtime import Runtime, Slot
from .wire import Answer, ClientGone, RequestTimeout, read_body

log = structlog.get_logger(__name__)

ERRORS = (MalformedBody, SignatureRefused, NotFound, RequestTimeout, BodyTooLarge, Unavailable)


class Received(msgspec.Struct):
    """Everything is stored; `new` of it was not known before."""

    received: int
    new: int


@dataclass
class _SendGrid(Operation):
    """The body is taken as it came; this documents it."""

    def __post_init__(self) -> None:
        events = Schema(type=OpenAPIType.ARRAY, items=Schema(type=OpenAPIType.OBJECT))
        self.request_body = RequestBody({"application/json": OpenAPIMediaType(schema=events)}, required=True)


@dataclass
class _Sns(Operation):
    def __post_init__(self) -> None:
        (_, schemas) = msgspec.json.schema_components([sns.Envelope])
        envelope = OpenAPIMediaType(schema=cast("Schema", schemas["Envelope"]))
        self.request_body = RequestBody({"text/plain": envelope}, required=True)


def routes(slot: Slot, fetch: sns.Fetch) -> Sequence[HTTPRouteHandler]:
    """The handlers, bound to where they find the runtime."""
    verifier = sns.Verifier(fetch)

    @post(
        "/webhooks/sendgrid",
        operation_id="receiveSendGridEvents",
        operation_class=_SendGrid,
        summary="Events of SendGrid",
        tags=["provider webhooks"],
        status_code=HTTPStatus.OK,
        responses=problems.documented(*ERRORS),
    )
    async def sendgrid_events(
        request: Request[Any, Any, Any],
        signature: Annotated[  # noqa: ARG001 - read from the headers; this documents it
            str | None,
            HeaderParameter(
                name="X-Twilio-Email-Event-Webhook-Signature", description="ECDSA over time stamp and body, base64."
            ),
        ] = None,
        timestamp: Annotated[  # noqa: ARG001 - likewise
            str | None,
            HeaderParameter(
                name="X-Twilio-Email-Event-Webhook-Timestamp", description="Seconds since 1970; has to be recent."
            ),
        ] = None,
    ) -> Response[bytes]:
        """A JSON array of events, signed with the key of SENDGRID_WEBHOOK_SECRET. Each is kept once, by its `sg_event_id`."""
        return await _answered("sendgrid", _sendgrid(slot.runtime, request))

    @post(
        "/webhooks/ses",
        operation_id="receiveSesEvents",
        operation_class=_Sns,
        summary="Events of Amazon SES, through SNS",
        tags=["provider webhooks"],
        status_code=HTTPStatus.OK,
        responses=problems.documented(*ERRORS),
    )
    async def ses_events(request: Request[Any, Any, Any]) -> Response[bytes]:
        """A message of Amazon SNS (SignatureVersion 2) of a topic in SES_TOPIC_ARNS. Subscriptions are confirmed by themselves;
        a notification is kept once, by its `MessageId`."""
        return await _answered("ses", _ses(slot.runtime, request, verifier))

    return [sendgrid_events, ses_events]


async def _sendgrid(runtime: Runtime, request: Request[Any, Any, Any]) -> Received:
    settings, headers = runtime.settings, dict(request.scope["headers"])
    if settings.sendgrid_webhook_secret is None:
        raise NotFound("Events of SendGrid are not taken here: SENDGRID_WEBHOOK_SECRET is not set.")
    sendgrid.check_freshness(headers, settings.sendgrid_webhook_max_age, datetime.now(UTC))
    body = await read_body(headers, request.receive, settings.max_file_size, settings.request_timeout)
    sendgrid.check_signature(headers, body, settings.sendgrid_webhook_secret)
    return await _store(runtime, "sendgrid", sendgrid.split(body))


async def _ses(runtime: Runtime, request: Request[Any, Any, Any], verifier: sns.Verifier) -> Received:
    settings, headers = runtime.settings, dict(request.scope["headers"])
    if not settings.ses_topic_arns:
        raise NotFound("Events of SES are not taken here: SES_TOPIC_ARNS is not set.")
    limit_bytes = min(settings.max_file_size, sns.MOST_BYTES)
    envelope = sns.read(await read_body(headers, request.receive, limit_bytes, settings.request_timeout))
    now = datetime.now(UTC)
    host = sns.check_origin(envelope, headers, settings.ses_topic_arns, now)
    await verifier.check(envelope, now)
    if envelope.type == "SubscriptionConfirmation":
        await verifier.confirm(envelope, host)
        log.info("sns.subscribed", topic=envelope.topic_arn)
        return Received(0, 0)
    if envelope.type == "UnsubscribeConfirmation":
        log.error("sns.unsubscribed", topic=envelope.topic_arn)
        return Received(0, 0)
    return await _store(runtime, "ses", [(envelope.message_id, envelope.message.encode())])


async def _store(runtime: Runtime, provider: str, items: Sequence[tuple[str, bytes]]) -> Received:
    if not items:
        return Received(0, 0)
    new = await receipts.receive(runtime.pool, provider, items)
    if new:
        runtime.doorbell.ring()
    return Received(len(items), new)


async def _answered(provider: str, work: Awaitable[Received]) -> Response[bytes]:
    try:
        received = await work
    except SignatureRefused as error:
        log.warning("webhook.refused", provider=provider, reason=error.detail)
        raise
    except ClientGone:
        return Response(b"", status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
    return problems.response(Answer(HTTPStatus.OK, msgspec.json.encode(received)))
