"""Webhook endpoints: where a user's events are sent, whether they arrive there, and how to have them sent again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, delete, get, post, put
from litestar.connection import ASGIConnection
from litestar.handlers import HTTPRouteHandler
from litestar.handlers.base import BaseRouteHandler
from litestar.params import JSONBody, PathParameter, QueryParameter

from neoforge_email import endpoints
from neoforge_email.egress import Egress, NotPublic
from neoforge_email.endpoints import (
    Deliveries,
    Endpoint,
    EndpointDetail,
    EndpointDisabled,
    EndpointRequest,
    EndpointWithSecret,
    Replayed,
    State,
    TooManyEndpoints,
)
from neoforge_email.errors import (
    FieldError,
    MalformedBody,
    NeoforgeError,
    NotFound,
    Unauthorized,
    Unavailable,
    ValidationFailed,
)

from . import problems
from .runtime import Slot

PATH = "/webhook-endpoints"
TAG = "webhook endpoints"
PAGE = 50
URL_PATIENCE_SECONDS = 5

EndpointId = Annotated[UUID, PathParameter(description="The endpoint's id.")]


class Queued(msgspec.Struct, kw_only=True):
    """The `webhook-id` of the `webhook.test` that was queued."""

    id: str


Time = Annotated[datetime, msgspec.Meta(tz=True, description="With a time zone.", examples=["2026-03-01T12:00:00Z"])]


class ReplayRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Either `ids`, or the time `from` and `to` which the deliveries were queued."""

    ids: (
        Annotated[
            list[str],
            msgspec.Meta(
                description=f"Their webhook-ids, at most {endpoints.REPLAYED_IDS}.",
                examples=[["msg_01a20bfa4ebb78c09472c1c1bfced7cf"]],
                max_length=endpoints.REPLAYED_IDS,
            ),
        ]
        | None
    ) = None
    begin: Time | None = msgspec.field(name="from", default=None)
    end: Time | None = msgspec.field(name="to", default=None)


async def checked(request: EndpointRequest, egress: Egress) -> EndpointRequest:
    """The request with its URL as it will be used. Raises ValidationFailed with every fault found.

    That the host's addresses are public is asked here for the answer's sake; what counts is asked again at each connection.
    """
    errors: list[FieldError] = []
    if not request.description.isprintable():
        errors.append({"field": "description", "message": "must be one line without control characters"})
    errors += [
        {"field": f"types[{position}]", "message": f"is no event type; there are {', '.join(sorted(endpoints.TYPES))}"}
        for position, name in enumerate(request.types)
        if name not in endpoints.TYPES
    ]
    url = request.url
    try:
        url = await _usable(request.url, egress)
    except ValueError as error:
        errors.append({"field": "url", "message": str(error)})
    if errors:
        raise ValidationFailed("Some fields cannot be accepted.", errors=errors)
    return EndpointRequest(url=url, description=request.description, types=sorted(set(request.types)))


async def _usable(text: str, egress: Egress) -> str:
    """The URL as it will be used; raises ValueError. A name server that does not answer refuses nothing."""
    url = egress.check(text)
    assert url.raw_host is not None
    assert url.port is not None
    try:
        async with asyncio.timeout(URL_PATIENCE_SECONDS):
            await egress.addresses(url.raw_host, url.port)
    except NotPublic:
        raise ValueError(
            "must be reachable from the internet: its name leads to an address that is not public"
        ) from None
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:
            raise ValueError("must have a host name that exists: look for a typing error") from None
    except (OSError, TimeoutError):
        pass
    return str(url)


def routes(slot: Slot) -> Sequence[HTTPRouteHandler]:
    """The handlers, bound to where they find the runtime."""

    async def authenticate(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        """Who may not come in is told so before the body is read."""
        connection.scope["user"] = await slot.runtime.keys.user_id(dict(connection.scope["headers"]))

    def common(*errors: type[NeoforgeError]) -> dict[str, Any]:
        documented = problems.documented(Unauthorized, *errors, Unavailable)
        return {"tags": [TAG], "guards": [authenticate], "responses": documented}

    return [*_of_endpoints(slot, common), *_of_secrets_and_health(slot, common), *_of_deliveries(slot, common)]


Common = Callable[..., dict[str, Any]]
"""What every route has, with the errors of its own that it may answer with."""


def _of_endpoints(slot: Slot, common: Common) -> list[HTTPRouteHandler]:
    @post(
        PATH,
        operation_id="createWebhookEndpoint",
        summary="Have events sent somewhere",
        **common(MalformedBody, TooManyEndpoints, ValidationFailed),
    )
    async def create(request: Request[int, Any, Any], data: JSONBody[EndpointRequest]) -> EndpointWithSecret:
        """A new endpoint. The answer alone holds its secret."""
        return await endpoints.create(slot.runtime.pool, request.user, await checked(data, slot.runtime.egress))

    @get(PATH, operation_id="listWebhookEndpoints", summary="Your endpoints", **common())
    async def list_all(request: Request[int, Any, Any]) -> list[Endpoint]:
        """Every endpoint of yours, oldest first."""
        return await endpoints.list_all(slot.runtime.pool, request.user)

    @get(
        PATH + "/{endpoint_id:uuid}",
        operation_id="getWebhookEndpoint",
        summary="One endpoint: how it is, and why",
        **common(NotFound),
    )
    async def get_one(request: Request[int, Any, Any], endpoint_id: EndpointId) -> EndpointDetail:
        """The endpoint, its deliveries counted by state, and what happened to it lately."""
        return await endpoints.get(slot.runtime.pool, request.user, endpoint_id)

    @put(
        PATH + "/{endpoint_id:uuid}",
        operation_id="changeWebhookEndpoint",
        summary="Change an endpoint",
        **common(MalformedBody, NotFound, ValidationFailed),
    )
    async def change(
        request: Request[int, Any, Any], endpoint_id: EndpointId, data: JSONBody[EndpointRequest]
    ) -> Endpoint:
        """Replace its URL, description and types. A new URL is tried at once."""
        wanted = await checked(data, slot.runtime.egress)
        return await endpoints.change(slot.runtime.pool, request.user, endpoint_id, wanted)

    @delete(
        PATH + "/{endpoint_id:uuid}",
        operation_id="deleteWebhookEndpoint",
        summary="Delete an endpoint",
        **common(NotFound),
    )
    async def delete_one(request: Request[int, Any, Any], endpoint_id: EndpointId) -> None:
        """Delete it with everything that was queued for it."""
        await endpoints.delete(slot.runtime.pool, request.user, endpoint_id)

    return [create, list_all, get_one, change, delete_one]


def _of_secrets_and_health(slot: Slot, common: Common) -> list[HTTPRouteHandler]:
    @post(
        PATH + "/{endpoint_id:uuid}/rotate-secret",
        operation_id="rotateWebhookSecret",
        summary="A new secret",
        status_code=HTTPStatus.OK,
        **common(NotFound),
    )
    async def rotate_secret(request: Request[int, Any, Any], endpoint_id: EndpointId) -> EndpointWithSecret:
        """For 24 hours both the new and the present secret sign, so that nothing is refused meanwhile."""
        return await endpoints.rotate_secret(slot.runtime.pool, request.user, endpoint_id)

    @post(
        PATH + "/{endpoint_id:uuid}/enable",
        operation_id="enableWebhookEndpoint",
        summary="Enable it, or try it at once",
        status_code=HTTPStatus.OK,
        **common(NotFound),
    )
    async def enable(request: Request[int, Any, Any], endpoint_id: EndpointId) -> Endpoint:
        """A disabled endpoint gets new events again (a replay brings the others); a failing one is tried at once."""
        return await endpoints.enable(slot.runtime.pool, request.user, endpoint_id)

    @post(
        PATH + "/{endpoint_id:uuid}/test",
        operation_id="testWebhookEndpoint",
        summary="Send a test event",
        status_code=HTTPStatus.ACCEPTED,
        **common(NotFound, EndpointDisabled),
    )
    async def test(request: Request[int, Any, Any], endpoint_id: EndpointId) -> Queued:
        """Queue a `webhook.test`, whatever types the endpoint has chosen. Look for it among the deliveries."""
        return Queued(id=await endpoints.test(slot.runtime.pool, request.user, endpoint_id))

    return [rotate_secret, enable, test]


def _of_deliveries(slot: Slot, common: Common) -> list[HTTPRouteHandler]:
    @get(
        PATH + "/{endpoint_id:uuid}/deliveries",
        operation_id="listWebhookDeliveries",
        summary="What was sent, and what came of it",
        **common(NotFound, ValidationFailed),
    )
    async def deliveries(
        request: Request[int, Any, Any],
        endpoint_id: EndpointId,
        only: Annotated[State | None, QueryParameter(name="state", description="Only those in this state.")] = None,
        after: Annotated[str | None, QueryParameter(description="The `next` of the page before.")] = None,
        limit: Annotated[int, QueryParameter(description="How many.", ge=1, le=endpoints.PAGE)] = PAGE,
    ) -> Deliveries:
        """Newest first, with their payloads and the last answer. Delivered ones are kept for 30 days, dead ones for 90."""
        states = (only,) if only else endpoints.STATES
        cursor = None if after is None else _delivery_id("after", after)
        return await endpoints.deliveries(slot.runtime.pool, request.user, endpoint_id, states, cursor, limit)

    @post(
        PATH + "/{endpoint_id:uuid}/replay",
        operation_id="replayWebhookDeliveries",
        summary="Send deliveries again",
        status_code=HTTPStatus.ACCEPTED,
        **common(MalformedBody, NotFound, EndpointDisabled, ValidationFailed),
    )
    async def replay(
        request: Request[int, Any, Any], endpoint_id: EndpointId, data: JSONBody[ReplayRequest]
    ) -> Replayed:
        """Delivered and dead ones are queued again under the same `webhook-id`."""
        pool, user_id = slot.runtime.pool, request.user
        if data.ids is not None and data.begin is None and data.end is None:
            ids = [_delivery_id(f"ids[{position}]", text) for position, text in enumerate(data.ids)]
            return await endpoints.replay_ids(pool, user_id, endpoint_id, ids)
        if data.ids is None and data.begin is not None and data.end is not None:
            return await endpoints.replay_range(pool, user_id, endpoint_id, data.begin, data.end)
        message = "give either `ids`, or `from` and `to`"
        raise ValidationFailed("It is not said what to replay.", errors=[{"field": "ids", "message": message}])

    return [deliveries, replay]


def _delivery_id(field: str, text: str) -> UUID:
    found = endpoints.parse_webhook_id(text)
    if found is None:
        message = "must be a webhook-id: msg_ and 32 hexadecimal digits"
        raise ValidationFailed("Some fields cannot be accepted.", errors=[{"field": field, "message": message}])
    return found
