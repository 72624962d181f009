"""Send a message, and read what became of it.

The hot POST is answered in front of Litestar's router, which would cost as much again as all the rest. The route below it
documents the same function and serves what needs the router: requests with an `Origin`, for CORS.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Response, get, post
from litestar.datastructures import ResponseHeader
from litestar.enums import ScopeType
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter
from litestar.types import ASGIApp, Receive, Scope, Send

from neoforge_email import records
from neoforge_email.errors import NotFound, Unauthorized, Unavailable, UnsupportedMediaType
from neoforge_email.message import Kind
from neoforge_email.observability import EMAILS_ACCEPTED, HTTP_REQUEST_DURATION, HTTP_REQUESTS

from . import problems
from .runtime import Runtime, Slot
from .submission import decode, draft
from .wire import Answer, ClientGone, read_body


class AcceptedRecipient(msgspec.Struct):
    """One recipient, as it was accepted."""

    recipient: str
    kind: Kind
    status: str


class Accepted(msgspec.Struct):
    """The message is committed to the database and will be delivered; look at it under its id."""

    id: UUID
    created_at: datetime
    status: str
    recipients: list[AcceptedRecipient]


_encode = msgspec.json.Encoder().encode


async def submit(runtime: Runtime, headers: Mapping[bytes, bytes], receive: Receive) -> Answer:
    """Accept one message; the answer comes after its commit. Every error is an answer, too. Raises ClientGone.

    Who may not send is told so before the body is read. A client that hangs up does not take its message back: the intake
    goes on with it.
    """
    settings = runtime.settings
    try:
        user_id = await runtime.keys.user_id(headers)
        _check_media_type(headers.get(b"content-type", b""))
        request = decode(await read_body(headers, receive, settings.max_file_size, settings.request_timeout))
        accepted = await runtime.intake.accept(draft(request, user_id, headers.get(b"idempotency-key"), runtime.rules))
    except ClientGone:
        raise
    except Exception as error:  # noqa: BLE001 - one place turns every error into an answer
        return problems.answer(error)
    if not accepted.replayed:
        EMAILS_ACCEPTED.labels(request.priority).inc()
    recipients = [AcceptedRecipient(address, kind, status) for kind, address, status in accepted.recipients]
    body = _encode(Accepted(accepted.id, accepted.created_at, "queued", recipients))
    return Answer(HTTPStatus.ACCEPTED, body, headers=REPLAYED if accepted.replayed else {})


def _check_media_type(content_type: bytes) -> None:
    if content_type == b"application/json":
        return
    media_type, _, parameter = content_type.lower().replace(b'"', b"").partition(b";")
    if media_type.strip() != b"application/json" or parameter.strip() not in {b"", b"charset=utf-8"}:
        raise UnsupportedMediaType("Send the body as JSON in UTF-8, with the header `Content-Type: application/json`.")


REPLAYED = {"Idempotent-Replayed": "true"}


def in_front(router: ASGIApp, slot: Slot, path: str) -> ASGIApp:
    """The ASGI application that answers the hot POST itself and hands all else to the router; both are measured."""
    duration = HTTP_REQUEST_DURATION.labels(path)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await router(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] != path or scope["method"] != "POST" or b"origin" in headers:
            await _measured(router, scope, receive, send)
            return
        began = time.perf_counter()
        try:
            answer = await submit(slot.runtime, headers, receive)
        except ClientGone:
            return
        await answer.send(send)
        HTTP_REQUESTS.labels("POST", path, answer.status).inc()
        duration.observe(time.perf_counter() - began)

    return serve


async def _measured(router: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    began = time.perf_counter()
    status = HTTPStatus.INTERNAL_SERVER_ERROR.value

    async def note_status(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        await send(message)

    await router(scope, receive, note_status)
    route = scope.get("path_template") or "unknown"
    method = str(scope.get("method"))
    HTTP_REQUESTS.labels(method if method in METHODS else "other", route, status).inc()
    HTTP_REQUEST_DURATION.labels(route).observe(time.perf_counter() - began)


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})


def routes(slot: Slot) -> Sequence[HTTPRouteHandler]:
    """The handlers, bound to where they find the runtime."""

    @post(
        "/emails",
        operation_id="sendEmail",
        summary="Send a message",
        tags=["emails"],
        status_code=HTTPStatus.ACCEPTED,
        responses={
            202: ResponseSpec(Accepted, description="Committed; it will be delivered.", generate_examples=False),
            **problems.documented(*problems.ON_SUBMIT),
        },
        response_headers=[
            ResponseHeader(
                name="Idempotent-Replayed",
                description="`true` where an earlier request with this key was accepted; nothing new is sent.",
                documentation_only=True,
            )
        ],
    )
    async def send_email(
        request: Request[Any, Any, Any],
        idempotency_key: Annotated[  # noqa: ARG001 - `submit` reads it from the headers; this documents it
            str | None,
            HeaderParameter(
                name="Idempotency-Key",
                description="Makes a repeated request safe: within 24 hours a key stands for one message.",
            ),
        ] = None,
    ) -> Response[bytes]:
        """Accept one message to one or more recipients. The answer comes after the commit: from then on it is never lost."""
        try:
            return problems.response(await submit(slot.runtime, dict(request.scope["headers"]), request.receive))
        except ClientGone:
            return Response(b"", status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it

    @get(
        "/emails/{email_id:uuid}",
        operation_id="getEmail",
        summary="What became of a message",
        tags=["emails"],
        responses=problems.documented(Unauthorized, NotFound, Unavailable),
    )
    async def get_email(
        request: Request[Any, Any, Any], email_id: Annotated[UUID, PathParameter(description="The message's id.")]
    ) -> records.Email:
        """The message with its recipients and everything that happened to it as one timeline."""
        user_id = await slot.runtime.keys.user_id(dict(request.scope["headers"]))
        email = await slot.runtime.get_email(user_id, email_id)
        if email is None:
            raise NotFound(f"There is no message {email_id} among yours.")
        return email

    return [send_email, get_email]
