"""One root for every error that the service raises on purpose; each says what to do next.

`status`, `type` and `title` make the problem details (RFC 9457) that the API answers with; `type` is relative to the
API's documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypedDict


class FieldError(TypedDict):
    """What is wrong with one field of a request; `field` is a path such as `to[0]`."""

    field: str
    message: str


class NeoforgeError(Exception):
    """The root. `detail` is for the person who made the request; it holds no secret and no internals."""

    status = 500
    type = "internal-error"
    title = "Something went wrong on our side"

    def __init__(
        self, detail: str, *, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


class SettingsError(NeoforgeError):
    """The environment holds values that cannot be used; `detail` has a line for each."""

    type = "settings"
    title = "The settings cannot be used"


class MalformedBody(NeoforgeError):
    status = 400
    type = "malformed-body"
    title = "The request body is not JSON"


class Unauthorized(NeoforgeError):
    status = 401
    type = "unauthorized"
    title = "A valid API key is needed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class SignatureRefused(NeoforgeError):
    """A webhook's request is not, or is no longer, proof of what it says."""

    status = 403
    type = "signature-refused"
    title = "This request does not prove that it comes from the provider"


class NotFound(NeoforgeError):
    status = 404
    type = "not-found"
    title = "There is no such thing"


class IdempotencyKeyReused(NeoforgeError):
    """The key was used within its life time for a request with another body."""

    status = 409
    type = "idempotency-key-reused"
    title = "This idempotency key belongs to another request"


class BodyTooLarge(NeoforgeError):
    status = 413
    type = "body-too-large"
    title = "The request body is too large"


class UnsupportedMediaType(NeoforgeError):
    status = 415
    type = "unsupported-media-type"
    title = "The request body must be JSON"


class ValidationFailed(NeoforgeError):
    """The request is JSON but cannot be accepted; `errors` names every field that is wrong."""

    status = 422
    type = "validation-failed"
    title = "The request cannot be accepted as it is"


class Unavailable(NeoforgeError):
    """Nothing was accepted; the same request may be sent again after `Retry-After` seconds."""

    status = 503
    type = "unavailable"
    title = "Try again in a moment"

    def __init__(self, detail: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_seconds)})


class IntakeFull(Unavailable):
    type = "intake-full"
    title = "More messages are waiting than can be stored"


class DatabaseUnavailable(Unavailable):
    type = "database-unavailable"
    title = "The database cannot be reached"


class OutcomeUnknown(Unavailable):
    """The connection was lost while the message was being committed: it may or may not have been accepted."""

    type = "outcome-unknown"
    title = "It is not known whether the message was accepted"


class ProviderUnavailable(NeoforgeError):
    """A provider cannot be reached or refuses to talk to us; nothing was sent, and no message is to blame.

    `retry_after` is the provider's own word on when it can be used again.
    """

    type = "provider-unavailable"
    title = "The e-mail provider cannot be used"

    def __init__(self, detail: str, retry_after: timedelta | None = None) -> None:
        super().__init__(detail)
        self.retry_after = retry_after
