"""SendGrid's `POST /v3/mail/send` on the loopback interface: its limits, its error bodies, its webhooks, and its bad days.

Limits and words are those of SendGrid's public reference (mail-send errors, limitations, event webhook). In a test use
`sendgrid_double()` and set attributes; as a process of its own (`python -m tests.sendgrid_double --help`) it is steered by
`/control/…` and writes what it took into a journal, one JSON line a personalization, before it answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from aiohttp import web

from tests.sendgrid_events import EventWebhook, Taken
from tests.sendgrid_limits import MAX_BODY_BYTES, Json, check, error

API_KEY = "SG.double-of-sendgrid.only-for-tests"
Kind = Literal["hang", "drop", "drop_body", "answer", "throttle", "garbage"]


@dataclass(slots=True)
class Fault:
    """What happens to the next requests instead of a friendly answer.

    hang: no answer while the client waits. drop: the connection is reset without an answer. drop_body: it is reset before the
    body was read. answer: `status` with an error about `field`. throttle: 429, reset after `seconds`. garbage: `octets`,
    which are no HTTP. With `take` the mail was taken all the same, just before. `after` requests pass untouched, then the
    fault comes `times` times (0: until it is cleared), each `every`th request.
    """

    kind: Kind
    take: bool = False
    times: int = 1
    after: int = 0
    every: int = 1
    status: int = 500
    message: str = "internal server error"
    field: str | None = None
    seconds: float = 1
    octets: str = "\0\1\2 this is no HTTP\r\n\r\n"
    _seen: int = 0
    _used: int = 0

    def strikes(self) -> bool:
        """Whether this request is one of those; counts it."""
        self._seen += 1
        if self._seen <= self.after or (self._seen - self.after - 1) % self.every:
            return False
        self._used += 1
        return True

    @property
    def is_over(self) -> bool:
        return 0 < self.times <= self._used


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where events go by themselves: for each recipient of what is taken one event a kind, `delay` seconds later."""

    url: str
    kinds: tuple[str, ...] = ("processed", "delivered")
    delay: float = 0


@dataclass
class SendGridDouble(EventWebhook):
    """A listening double. Everything may be set while it runs.

    `invalid`: addresses that are refused with 400, where `vague` leaves out which personalization is meant. `rate`: so many
    requests within so many seconds, or None. `counts` has the personalizations taken a Message-ID, `copies` the same a
    recipient.
    """

    key: str = API_KEY
    journal: Path | None = None
    keepalive: float = 75
    port: int = 0
    latency: float = 0
    invalid: set[str] = field(default_factory=set)
    unverified: set[str] = field(default_factory=set)
    vague: bool = False
    rate: tuple[int, float] | None = None
    webhook: Webhook | None = None
    faults: list[Fault] = field(default_factory=list)
    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)  # personalizations of each request that was taken
    taken: list[Taken] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    _recent: deque[float] = field(default_factory=deque)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    _unreported: list[tuple[float, Json]] = field(default_factory=list)
    _runner: web.AppRunner | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _journal: int = -1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # --- its life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        if self.journal is not None:
            self._journal = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v3/mail/send", self._send)
        app.router.add_get("/v3/scopes", self._scopes)
        app.router.add_route("*", "/control/{what}", self._control)
        # With the handler cancelled when its client goes away, a hanging answer ends by itself.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, keepalive_timeout=self.keepalive, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._tasks = [asyncio.create_task(self._report())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    async def wait(self, personalizations: int, seconds: float = 10) -> list[Taken]:
        """What was taken, once it is so many; raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while len(self.taken) < personalizations:
                self._arrival.clear()
                await self._arrival.wait()
        return self.taken

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        assert self._runner is not None
        assert self._runner.server is not None
        return len(self._runner.server.connections)

    # --- mail/send ---------------------------------------------------------------------------------------------

    async def _send(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        fault = self._fault()
        if fault is not None and fault.kind == "drop_body":
            await request.content.read(1)
            return _reset(request)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            response = self._errors(413, [error("content too large")])
            response.force_close()
            return response
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault is not None and not fault.take:
            return await self._carry_out(fault, request)
        payload = self._admitted(request, body)
        if isinstance(payload, web.Response):
            return payload
        x_message_id = self._take(payload)
        if fault is not None:
            return await self._carry_out(fault, request)
        self.statuses[202] += 1
        return web.Response(status=202, headers={"X-Message-Id": x_message_id, **self._rate_headers()})

    def _fault(self) -> Fault | None:
        if not self.faults or not self.faults[0].strikes():
            return None
        fault = self.faults[0]
        if fault.is_over:
            self.faults.pop(0)
        return fault

    async def _carry_out(self, fault: Fault, request: web.Request) -> web.StreamResponse:
        match fault.kind:
            case "hang":
                await asyncio.Event().wait()
            case "garbage":
                assert request.transport is not None
                request.transport.write(fault.octets.encode("latin-1"))
                request.transport.close()
            case "throttle":
                reset = str(math.ceil(time.time() + fault.seconds))
                limits = {"X-RateLimit-Limit": "600", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}
                return self._errors(429, [error("too many requests")], limits)
            case "answer":
                return self._errors(fault.status, [error(fault.message, fault.field)])
            case _:
                return _reset(request)
        return web.Response(status=500)

    def _admitted(self, request: web.Request, body: bytes) -> Json | web.Response:
        """The payload, or the answer that refuses it."""
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return self._errors(401, [error("The provided authorization grant is invalid, expired, or revoked")])
        if request.content_type != "application/json":
            return self._errors(415, [error("unsupported media type")])
        if self._is_over_rate():
            return self._errors(429, [error("too many requests")])
        try:
            payload: Json = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self._errors(400, [error("Bad Request")])
        if errors := check(payload, self.invalid, vague=self.vague):
            return self._errors(400, errors)
        if payload["from"]["email"] in self.unverified:
            words = (
                "The from address does not match a verified Sender Identity. Mail cannot be sent until this error is"
            )
            return self._errors(403, [error(f"{words} resolved.", "from")])
        return payload

    def _errors(self, status: int, errors: list[Json], headers: dict[str, str] | None = None) -> web.Response:
        self.statuses[status] += 1
        return web.json_response({"errors": errors}, status=status, headers=headers or self._rate_headers())

    def _is_over_rate(self) -> bool:
        if self.rate is None:
            return False
        limit, seconds = self.rate
        now = time.time()
        while self._recent and self._recent[0] <= now - seconds:
            self._recent.popleft()
        if len(self._recent) >= limit:
            return True
        self._recent.append(now)
        return False

    def _rate_headers(self) -> dict[str, str]:
        limit, seconds = self.rate or (10_000, 1)
        reset = (self._recent[0] if self._recent else time.time()) + seconds
        left = limit - len(self._recent)
        return {
            "X-RateLimit-Limit": str(limit),
            "X-RateLimit-Remaining": str(left),
            "X-RateLimit-Reset": str(math.ceil(reset)),
        }

    def _take(self, payload: Json) -> str:
        x_message_id = secrets.token_urlsafe(16)
        now = time.time()
        taken = [
            Taken(now, x_message_id, payload["from"], payload.get("reply_to"), payload["content"], each)
            for each in payload["personalizations"]
        ]
        if self._journal >= 0:
            os.write(self._journal, b"".join(_journal_line(each) for each in taken))
        self.taken += taken
        self.sizes.append(len(taken))
        for each in taken:
            self.counts[each.message_id or ""] += 1
            self.copies.update((each.message_id or "", address) for address in each.recipients)
        if self.webhook is not None:
            due = now + self.webhook.delay
            self._unreported += [(due, event) for event in self.events(taken, self.webhook.kinds)]
        self._arrival.set()
        return x_message_id

    # --- its webhooks ------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Post what is due by `webhook`, again and again until it was taken, as SendGrid does."""
        while True:
            await asyncio.sleep(0.05)
            now = time.time()
            due = [each for each in self._unreported if each[0] <= now][:500]
            if not due or self.webhook is None:
                continue
            if 200 <= await self.post(self.webhook.url, [event for _, event in due]) < 300:
                sent = {id(each) for each in due}
                self._unreported = [each for each in self._unreported if id(each) not in sent]
            else:
                await asyncio.sleep(0.2)

    # --- steering ----------------------------------------------------------------------------------------------

    async def _scopes(self, _request: web.Request) -> web.Response:
        return web.json_response({"scopes": ["mail.send"]})

    async def _control(self, request: web.Request) -> web.Response:
        """`GET state`; `POST fault`, `POST set`, `POST events`, `POST clear` with a JSON object."""
        given: Json = await request.json() if request.can_read_body else {}
        match request.method, request.match_info["what"]:
            case "GET", "state":
                return web.json_response(self.state())
            case "POST", "fault":
                self.faults.append(Fault(**given))
            case "POST", "clear":
                self.faults.clear()
            case "POST", "set":
                self._set(given)
            case "POST", "events":
                return web.json_response(await self._post_as_told(**given))
            case _:
                raise web.HTTPNotFound
        return web.json_response(self.state())

    def state(self) -> Json:
        """What was counted, as `GET /control/state` answers it."""
        return {
            "requests": self.requests,
            "statuses": dict(self.statuses),
            "personalizations": len(self.taken),
            "messages": len(self.counts),
            "twice": sum(count > 1 for count in self.copies.values()),
            "unreported": len(self._unreported),
            "faults": [asdict(each) for each in self.faults],
            "verification_key": self.verification_key,
        }

    def _set(self, given: Json) -> None:
        for name, value in given.items():
            match name:
                case "invalid" | "unverified":
                    setattr(self, name, set(value))
                case "rate":
                    self.rate = None if value is None else (value[0], value[1])
                case "webhook":
                    self.webhook = None if value is None else Webhook(**{**value, "kinds": tuple(value["kinds"])})
                case "vague" | "latency":
                    setattr(self, name, value)
                case _:
                    raise web.HTTPBadRequest(text=f"{name} cannot be set")

    async def _post_as_told(
        self,
        url: str,
        kinds: Sequence[str],
        repeat: int = 1,
        order: Literal["as it happened", "reversed", "shuffled"] = "as it happened",
        batch: int = 500,
        message_ids: Sequence[str] | None = None,
    ) -> Json:
        wanted = None if message_ids is None else set(message_ids)
        events = (
            self.events([each for each in self.taken if wanted is None or each.message_id in wanted], kinds) * repeat
        )
        if order == "reversed":
            events.reverse()
        elif order == "shuffled":
            random.shuffle(events)
        answers = [await self.post(url, events[start : start + batch]) for start in range(0, len(events), batch)]
        return {"events": len(events), "answers": answers}


def _reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response(status=500)


def _journal_line(taken: Taken) -> bytes:
    entry = {
        "at": taken.at,
        "message_id": taken.message_id,
        "x_message_id": taken.x_message_id,
        "recipients": taken.recipients,
        **taken.custom_args,
    }
    return msgspec.json.encode(entry) + b"\n"


@contextlib.asynccontextmanager
async def sendgrid_double(**attributes: Any) -> AsyncIterator[SendGridDouble]:
    """Listen while the context lasts."""
    double = SendGridDouble(**attributes)
    await double.start()
    try:
        yield double
    finally:
        await double.close()


async def _serve(double: SendGridDouble) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await double.start()
    sys.stdout.write(json.dumps({"url": double.url, "verification_key": double.verification_key}) + "\n")
    sys.stdout.flush()
    await stop.wait()
    await double.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sendgrid_double", description="A double of SendGrid on loopback."
    )
    parser.add_argument("--port", type=int, default=0, help="default: any free one; the URL is printed as JSON")
    parser.add_argument("--journal", type=Path, help="append one JSON line for each personalization taken")
    parser.add_argument("--key", default=API_KEY, help="the API key that is accepted")
    parser.add_argument("--latency", type=float, default=0, help="seconds before each answer")
    given = parser.parse_args()
    asyncio.run(_serve(SendGridDouble(key=given.key, port=given.port, journal=given.journal, latency=given.latency)))


if __name__ == "__main__":
    main()
