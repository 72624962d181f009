"""The SES client of `providers.ses`: aiobotocore, made to say whether a request that failed may have arrived.

Imported only where SES is used: it costs a third of a second and 50 MB.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError

__all__ = ["BotoCoreError", "Failure", "create", "send_email"]

_LARGE_BODY = 1024 * 1024  # octets; more than this in one write would hold up the event loop

for _library in ("aiobotocore", "botocore"):  # at DEBUG they log whole requests: addresses, bodies, signatures
    logging.getLogger(_library).setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not taken for sure. `status` is None where no answer came, and then `written` counts: whether
    a part of the request may have arrived. `code` is empty where the answer is not of SES.
    """

    words: str
    written: bool
    status: int | None = None
    code: str = ""
    retry_after: timedelta | None = None


@asynccontextmanager
async def create(
    *,
    region: str,
    access_key_id: str | None,
    secret_access_key: str | None,
    endpoint_url: str | None,
    timeout: timedelta,
    connections: int,
) -> AsyncIterator[Any]:
    """A client with connections of its own, which are kept; nothing is connected yet. ValueError, BotoCoreError."""
    seconds = timeout.total_seconds()
    config = AioConfig(
        connect_timeout=seconds,
        read_timeout=seconds,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1},  # a second POST after a time-out is a second message
        http_session_cls=_Http,
    )
    async with _session().create_client(
        "sesv2",
        region_name=region,
        endpoint_url=endpoint_url,
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=config,
    ) as client:
        yield client


@cache
def _session() -> Any:
    """It keeps AWS's description of the service, which takes longest to read."""
    return AioSession()


async def send_email(client: Any, timeout: timedelta, **request: Any) -> str | Failure:
    """The id that SES gave to the message, or why there is none; takes no longer than `timeout`."""
    call = _Call()
    token = _CALL.set(call)
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            answer = await client.send_email(**request)
    except ClientError as error:
        return _answered(error)
    except TimeoutError:
        what = "no answer" if call.written else "not connected"
        return Failure(f"{what} within {timeout.total_seconds():g} s", call.written)
    except Exception as error:  # noqa: BLE001 - a server's nonsense fails in many ways, and what counts is how far the request came
        if call.redirected:
            return Failure("answered with a redirect; look at SES_ENDPOINT_URL", call.written, 302)
        return Failure(f"{type(error).__name__}: {error}", call.written)
    finally:
        _CALL.reset(token)
    message_id = answer.get("MessageId")
    if not message_id:
        return Failure("200 without a message id", written=True)
    return str(message_id)


def _answered(error: ClientError) -> Failure:
    answer = error.response
    metadata = answer["ResponseMetadata"]
    status, seconds = metadata["HTTPStatusCode"], metadata.get("HTTPHeaders", {}).get("retry-after", "")
    code, message = str(answer["Error"].get("Code", "")), answer["Error"].get("Message") or ""
    if code.isdigit():  # botocore's own, where the body holds none
        code = ""
    return Failure(
        f"{status} {code}: {message}" if code else f"{status} {message}",
        written=True,
        status=status,
        code=code,
        retry_after=timedelta(seconds=int(seconds)) if seconds.isdigit() and len(seconds) < 6 else None,
    )


class _Call:
    """How far one request has come."""

    def __init__(self) -> None:
        self.written = False
        self.redirected = False


_CALL: ContextVar[_Call] = ContextVar("ses_call")


class _Http(AIOHTTPSession):  # type: ignore[misc]
    """aiobotocore calls a connection that was never made and one that was reset after the request by the same error.

    aiohttp knows better: it says when it begins to connect and when it begins to write.
    """

    async def send(self, request: Any) -> Any:
        _CALL.get().written = True  # unless aiohttp says otherwise
        if len(request.body) > _LARGE_BODY:
            request.body = io.BytesIO(request.body)
        return await super().send(request)

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        if _TRACE not in session.trace_configs:
            session.trace_configs.append(_TRACE)
        return session


async def _started(_: aiohttp.ClientSession, __: SimpleNamespace, ___: aiohttp.TraceRequestStartParams) -> None:
    _CALL.get().written = False


async def _writing(_: aiohttp.ClientSession, __: SimpleNamespace, ___: aiohttp.TraceRequestHeadersSentParams) -> None:
    _CALL.get().written = True


async def _redirected(
    _: aiohttp.ClientSession, __: SimpleNamespace, params: aiohttp.TraceRequestRedirectParams
) -> None:
    """A message is never sent on to where an answer points."""
    _CALL.get().redirected = True
    params.response.close()
    raise aiohttp.ClientError("redirect")


_TRACE = aiohttp.TraceConfig()
_TRACE.on_request_start.append(_started)
_TRACE.on_request_headers_sent.append(_writing)
_TRACE.on_request_redirect.append(_redirected)
_TRACE.freeze()
