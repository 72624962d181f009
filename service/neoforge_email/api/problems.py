"""Every error answer of the API, as problem details (RFC 9457), made in this one place."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, ValidationException
from litestar.openapi.datastructures import ResponseSpec

from neoforge_email.errors import (
    BodyTooLarge,
    FieldError,
    IdempotencyKeyReused,
    MalformedBody,
    NeoforgeError,
    NotFound,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    ValidationFailed,
)

from .wire import Answer, RequestTimeout

MEDIA_TYPE = "application/problem+json"

log = structlog.get_logger(__name__)


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What went wrong, for programs (`type`, `errors`) and for people (`title`, `detail`)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []
    error_id: str | None = None


def answer(error: Exception) -> Answer:
    """The answer to any exception. What is not ours or Litestar's is logged whole, and answered with the log's id only."""
    if isinstance(error, NeoforgeError) and error.status != HTTPStatus.INTERNAL_SERVER_ERROR:
        problem = Problem(
            type=_type(error.type), title=error.title, status=error.status, detail=error.detail, errors=error.errors
        )
        return Answer(error.status, msgspec.json.encode(problem), MEDIA_TYPE, error.headers)
    if isinstance(error, HTTPException) and error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return _of_litestar(error)
    error_id = str(uuid.uuid4())
    log.error("api.error", error_id=error_id, exc_info=error)
    problem = Problem(
        type=_type(NeoforgeError.type),
        title=NeoforgeError.title,
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        detail=f"The error is in the service's log as {error_id}; nothing more is known to the caller.",
        error_id=error_id,
    )
    return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, msgspec.json.encode(problem), MEDIA_TYPE)


def _of_litestar(error: HTTPException) -> Answer:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return answer(NotFound("There is nothing under this path; /docs shows what there is."))
    if isinstance(error, ValidationException):
        faults: list[Any] = error.extra if isinstance(error.extra, list) else []
        errors: list[FieldError] = [
            {"field": fault.get("key", ""), "message": fault.get("message", "")} for fault in faults
        ]
        return answer(ValidationFailed("Some fields cannot be accepted.", errors=errors))
    status = HTTPStatus(error.status_code)
    headers: Mapping[str, str] = error.headers or {}
    detail = error.detail
    if isinstance(error, MethodNotAllowedException):
        detail = "This method is not allowed here; the header Allow names those that are."
    # RFC 9457, 4.2.1: what means no more than its status has this type
    problem = Problem(type="about:blank", title=status.phrase, status=status, detail=detail)
    return Answer(status, msgspec.json.encode(problem), MEDIA_TYPE, headers)


def handle(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's exception handler."""
    return response(answer(error))


def response(made: Answer) -> Response[bytes]:
    """An answer on its way through Litestar's router."""
    return Response(made.body, status_code=made.status, media_type=made.media_type, headers=dict(made.headers))


def documented(*kinds: type[NeoforgeError]) -> dict[int, ResponseSpec]:
    """OpenAPI's description of these errors and of those that every route may answer with."""
    specs: dict[int, ResponseSpec] = {}
    every: tuple[type[NeoforgeError], ...] = (*kinds, NeoforgeError)
    for kind in every:
        others = [other for other in every if other.status == kind.status]
        specs[kind.status] = ResponseSpec(
            data_container=Problem,
            generate_examples=False,
            description="; ".join(dict.fromkeys(f"{other.title} (`{_type(other.type)}`)" for other in others)),
            media_type=MEDIA_TYPE,
        )
    return specs


ON_SUBMIT = (
    MalformedBody,
    Unauthorized,
    RequestTimeout,
    IdempotencyKeyReused,
    BodyTooLarge,
    UnsupportedMediaType,
    ValidationFailed,
    Unavailable,
)


def _type(name: str) -> str:
    return f"/docs/problems#{name}"
