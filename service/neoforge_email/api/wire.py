"""What the hot route needs of HTTP: reading a bounded body and writing an answer, on plain ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from litestar.types import Receive, Send

from neoforge_email.errors import BodyTooLarge, NeoforgeError


class ClientGone(Exception):
    """The client hung up before its request was complete; there is nobody to answer."""


class RequestTimeout(NeoforgeError):
    status = 408
    type = "request-timeout"
    title = "The request body did not arrive in time"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response. The same object goes out through the hot route and through Litestar's router."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    async def send(self, send: Send) -> None:
        headers = [
            (b"content-type", self.media_type.encode()),
            (b"content-length", b"%d" % len(self.body)),
        ]
        if self.headers:
            headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int, limit: timedelta) -> bytes:
    """The request's body, at most `limit_bytes`, within `limit`; without reading any of it if its announced length is over.

    Raises BodyTooLarge, RequestTimeout, ClientGone. What is left unread the server discards.
    """
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > limit_bytes:
        raise _too_large(limit_bytes)
    try:
        async with asyncio.timeout(limit.total_seconds()):
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                body = message.get("body", b"")
                if len(body) > limit_bytes:
                    raise _too_large(limit_bytes)
                return body
            return await _read_parts(message, receive, limit_bytes)
    except TimeoutError:
        raise RequestTimeout(f"Send the whole body within {limit.total_seconds():g} seconds.") from None


async def _read_parts(message: Mapping[str, object], receive: Receive, limit_bytes: int) -> bytes:
    body = bytearray()
    while True:
        if message["type"] != "http.request":
            raise ClientGone
        part = message.get("body", b"")
        assert isinstance(part, bytes)
        body += part
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        if not message.get("more_body"):
            return bytes(body)
        message = await receive()


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"A request body may have at most {limit_bytes} bytes (MAX_FILE_SIZE).")
