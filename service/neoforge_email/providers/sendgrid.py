"""SendGrid's v3 `mail/send` over kept HTTP connections: messages that share their content go in one request.

Every message is a personalization of its own, with its own Message-ID, subject, headers and, as a custom argument, the
attempt's id, which comes back in every event. The payloads are built by the `sendgrid` package (5.9 µs a message, plain
dictionaries 0.6); the call itself is aiohttp's, because that package blocks.

What an answer means: 202 is taken. 429, 401, 403 about the account, and an address that is not SendGrid's say that nothing was
taken and that no message is to blame. Any other 4xx is a refusal of what was sent; since nothing of that request was taken, it
is asked again without those whom the refusal names, or in halves where it names nobody. Everything else leaves it open:
5xx, no answer in time, a connection lost after it was made, an answer that is no HTTP. aiohttp repeats no POST by itself, and a
connection is kept for less time than servers keep theirs, so that none is closed while a request goes out.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from email.header import Header as MimeHeader
from email.utils import parsedate_to_datetime
from io import BytesIO
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import msgspec
from sendgrid.helpers import mail  # type: ignore[import-untyped]  # the package has no types
from sendgrid.helpers.mail.exceptions import ApiKeyIncludedException  # type: ignore[import-untyped]  # likewise
from sendgrid.helpers.mail.validators import ValidateApiKey  # type: ignore[import-untyped]  # likewise

from neoforge_email.errors import FieldError, ProviderUnavailable
from neoforge_email.message import Draft, Kind, Mailbox, Message, Recipient
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope

ATTEMPT = "neoforge_attempt"
"""The custom argument that carries `Message.attempt`."""

MAX_RECIPIENTS = 1000  # to, cc and bcc of one request together; also the most personalizations
MAX_REQUEST_BYTES = 30_000_000
IDLE = timedelta(seconds=15)  # load balancers close after 60 s or more
MAX_PAUSE = timedelta(hours=1)  # whatever a header says

_ANSWER_BYTES = 1 << 20
_RESERVED = re.compile(
    "x-sg-.*|x-smtpapi|received|dkim-signature|content-(type|transfer-encoding)|to|from|subject|reply-to|b?cc",
    re.IGNORECASE,
)
_NAMED = re.compile(r"personalizations\.(\d{1,4})(?:\.(to|cc|bcc)\.(\d{1,4}))?(?:\..*)?")
_KEYS = ValidateApiKey()
_LINE_BREAK = re.compile("[\r\n\0]")
_PLACES = {Kind.TO: mail.To, Kind.CC: mail.Cc, Kind.BCC: mail.Bcc}


def unsupported(draft: Draft) -> list[FieldError]:
    """What SendGrid cannot do, by field of the request."""
    errors: list[FieldError] = []
    if all(kind is not Kind.TO for kind, _ in draft.recipients):
        errors.append({"field": "to", "message": "at least one recipient must stand in to: SendGrid requires it"})
    if not draft.subject:
        errors.append({"field": "subject", "message": "must not be empty: SendGrid requires a subject"})
    errors += [
        {"field": f"headers.{name}", "message": "remove it: SendGrid keeps this header for itself"}
        for name in draft.headers
        if _RESERVED.fullmatch(name)
    ]
    for where, text in (("html", draft.html), ("text", draft.text)):
        try:
            _KEYS.validate_message_text(text)
        except ApiKeyIncludedException:
            errors.append({"field": where, "message": "must not begin with what looks like a SendGrid API key"})
    return errors


class SendGridProvider:
    """See `base.Provider`. ValueError if the key or the URL cannot be used; plain HTTP is for this machine only.

    `reports` says that events come back. `idle`: how long an unused connection is kept.
    """

    name = "sendgrid"
    window = MAX_RECIPIENTS

    def __init__(
        self,
        api_key: str,
        *,
        url: str = "https://api.sendgrid.com",
        timeout: timedelta = timedelta(seconds=30),
        connections: int = 8,
        reports: bool = False,
        idle: timedelta = IDLE,
    ) -> None:
        if not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise ValueError("SENDGRID_API_KEY: write the key as SendGrid shows it, without spaces")
        self.connections = connections
        self.timeout = timeout
        self.reports = reports
        self._key = api_key
        self._url = _endpoint(url)
        self._idle = idle.total_seconds()
        self._slots = asyncio.Semaphore(connections)
        self._in_use = 0
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._paused_until = 0.0  # on the monotonic clock

    def calls(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Messages of one user that share sender, reply_to and content, at most 1000 recipients a call."""
        calls: list[list[Message]] = []
        latest: dict[tuple[object, ...], tuple[list[Message], int]] = {}
        for message in messages:
            shared = (message.user_id, message.sender, message.reply_to, message.html, message.text)
            count = len(message.open_recipients)
            call, recipients = latest.get(shared, ([], MAX_RECIPIENTS))
            if recipients + count > MAX_RECIPIENTS:
                call, recipients = [], 0
                calls.append(call)
            call.append(message)
            latest[shared] = (call, recipients + count)
        return calls

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[SendGridProvider]:
        """See `base.Provider.connection`. The connection is made with the first request; ProviderUnavailable during a pause."""
        async with self._slots:
            if (pause := self._pause()) is not None:
                raise ProviderUnavailable(f"SendGrid's rate limit is used up for {pause.total_seconds():.0f} s", pause)
            self._in_use += 1
            try:
                yield self
            finally:
                self._in_use -= 1
                await self._close_unused()

    async def close(self) -> None:
        """See `base.Provider.close`."""
        self._is_closed = True
        await self._close_unused()

    async def _close_unused(self) -> None:
        # Closing the session breaks off the calls that run, and what they carried would be uncertain.
        if self._is_closed and not self._in_use and self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        """See `base.Connection.send`; `may_start` is asked before each request, and `timeout` bounds each.

        Once SendGrid cannot be used, or gives no answer, the rest of the window is not sent.
        """
        results: dict[UUID, Result] = {}
        requests = deque(request for call in self.calls(window) for request in _requests(call, results))
        left = NOT_STARTED
        while requests:
            for _ in range(3):  # lets the loop notice what the server closed in the meantime
                await asyncio.sleep(0)
            if (pause := self._pause()) is not None:
                left = Result(
                    Outcome.DEFERRED, Scope.CONNECTION, "not sent: the rate limit is used up", retry_after=pause
                )
                break
            if not may_start():
                break
            request = requests.popleft()
            answer = await self._post(request)
            if isinstance(answer, _Refusal):
                requests.extendleft(reversed(_without(request, answer, results)))
                continue
            request.settle(answer, results)
            if answer.scope is Scope.CONNECTION:
                left = answer
                break
            if answer.outcome is Outcome.UNCERTAIN:
                left = Result(Outcome.DEFERRED, Scope.CONNECTION, "not sent: the request before it has no answer")
                break
        return [tuple(results.get(recipient.id, left) for recipient in message.open_recipients) for message in window]

    async def _post(self, request: _Request) -> Result | _Refusal:
        """One HTTP request and what its answer means; the status line counts even if the body does not arrive."""
        seconds = self.timeout.total_seconds()
        status, body = 0, bytearray()
        headers: Mapping[str, str] = {}
        try:
            async with (
                asyncio.timeout(seconds),
                self._opened().post(self._url, data=BytesIO(request.body), allow_redirects=False) as response,
            ):
                status, headers = response.status, response.headers
                if status != 202:
                    async for piece in response.content.iter_any():
                        body += piece
                        if len(body) > _ANSWER_BYTES:
                            break
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Result(Outcome.DEFERRED, Scope.CONNECTION, self._line(f"cannot be reached: {error}"))
        except (aiohttp.ClientError, OSError) as error:
            if not status:
                return Result(Outcome.UNCERTAIN, Scope.MESSAGE, self._line(_lost(error)))
        return self._meaning(status, headers, bytes(body))

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            seconds = self.timeout.total_seconds()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.connections, keepalive_timeout=self._idle),
                # Bounded by half, so that running out of time while connecting is never taken for more than that.
                timeout=aiohttp.ClientTimeout(connect=min(seconds / 2, 10), ceil_threshold=math.inf),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
            )
        return self._session

    def _meaning(self, status: int, headers: Mapping[str, str], body: bytes) -> Result | _Refusal:
        errors = [(where, self._line(f"{status} {words}")) for where, words in _errors(body)]
        response = self._line("; ".join(words for _, words in errors)) or str(status)
        outcome, scope, wait = Outcome.UNCERTAIN, Scope.MESSAGE, None
        match status:
            case 202:
                if headers.get("X-RateLimit-Remaining") == "0":
                    self._pause_for(_wait(headers))
                return Result(Outcome.TAKEN, Scope.MESSAGE, "202 Accepted", headers.get("X-Message-Id"))
            case 400 | 413 | 415 | 422:
                return _Refusal(response, errors, is_final=bool(errors) or status == 413)
            case 403 if any(_NAMED.fullmatch(where) or _is_shared(where) for where, _ in errors):
                # Such as a sender that nobody verified: no word on the account.
                return _Refusal(response, errors)
            case 401 | 403 | 404 | 405 | 301 | 307 | 308:
                outcome, scope = Outcome.DEFERRED, Scope.CONNECTION
            case 429:
                outcome, scope, wait = Outcome.DEFERRED, Scope.CONNECTION, _wait(headers)
                self._pause_for(wait)
            case _ if 400 <= status < 500:
                outcome = Outcome.DEFERRED
        return Result(outcome, scope, response, retry_after=wait)

    def _pause(self) -> timedelta | None:
        left = self._paused_until - time.monotonic()
        return timedelta(seconds=left) if left > 0 else None

    def _pause_for(self, wait: timedelta | None) -> None:
        if wait is not None:
            self._paused_until = max(self._paused_until, time.monotonic() + wait.total_seconds())

    def _line(self, text: str) -> str:
        """On one line, and without the key, should an answer repeat it."""
        return " ".join(text.replace(self._key, "***").split())[:500]


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Letter:
    """One personalization: a message, or the part of it that can be addressed together."""

    message: Message
    places: dict[Kind, list[Recipient]]
    octets: bytes


@dataclass(slots=True)
class _Request:
    """Letters that share their content; `shared` is the JSON object without its last brace."""

    shared: bytes
    letters: list[_Letter]

    @property
    def body(self) -> bytes:
        return self.shared + b',"personalizations":[' + b",".join([letter.octets for letter in self.letters]) + b"]}"

    def settle(self, result: Result, results: dict[UUID, Result]) -> None:
        for letter in self.letters:
            _settle(letter, result, results)


def _settle(letter: _Letter, result: Result, results: dict[UUID, Result]) -> None:
    for recipients in letter.places.values():
        results.update((recipient.id, result) for recipient in recipients)


def _requests(call: Sequence[Message], results: dict[UUID, Result]) -> Iterator[_Request]:
    """Usually one; more where it would be too large. What cannot be written is settled in `results`."""
    shared = b""
    letters: list[_Letter] = []
    size = 0
    for message in call:
        try:
            shared = shared or msgspec.json.encode(_shared(message))[:-1]
            new = list(_letters(message, message.open_recipients))
            more = sum(len(letter.octets) + 1 for letter in new)
            if len(shared) + more > MAX_REQUEST_BYTES:
                raise ValueError(f"{len(shared) + more} bytes are more than SendGrid takes")
        except (ValueError, ApiKeyIncludedException) as error:
            results.update((recipient.id, _unwritable(error)) for recipient in message.open_recipients)
            continue
        if letters and len(shared) + size + more > MAX_REQUEST_BYTES:
            yield _Request(shared, letters)
            letters, size = [], 0
        letters += new
        size += more
    if letters:
        yield _Request(shared, letters)


def _unwritable(error: Exception) -> Result:
    words = str(error) or "it begins with what looks like a SendGrid API key"
    return Result(Outcome.REFUSED, Scope.MESSAGE, f"cannot be written as JSON: {words}"[:500])


def _shared(message: Message) -> dict[str, Any]:
    envelope = mail.Mail()
    envelope.from_email = _email(mail.From, message.sender)
    if message.reply_to is not None:
        envelope.reply_to = _email(mail.ReplyTo, message.reply_to)
    if message.text is not None or message.html is None:
        envelope.add_content(message.text or "", mail.MimeType.text)
    if message.html is not None:
        envelope.add_content(message.html, mail.MimeType.html)
    payload: dict[str, Any] = envelope.get()
    return payload


def _letters(message: Message, recipients: Sequence[Recipient]) -> Iterator[_Letter]:
    """Every personalization needs someone in `to`: without such a one the first in cc steps in, whom all may see anyway.

    Of those in bcc nobody may see another, so that without to and cc each gets a letter to itself.
    """
    places = {kind: [recipient for recipient in recipients if recipient.kind is kind] for kind in Kind}
    if places[Kind.TO] or places[Kind.CC]:
        if not places[Kind.TO]:
            places[Kind.TO].append(places[Kind.CC].pop(0))
        yield _letter(message, places)
        return
    for recipient in places[Kind.BCC]:
        yield _letter(message, {Kind.TO: [recipient]})


def _letter(message: Message, places: dict[Kind, list[Recipient]]) -> _Letter:
    if _LINE_BREAK.search(message.subject) or any(map(_LINE_BREAK.search, message.headers.values())):
        raise ValueError("the subject or a header holds a line break or NUL")
    personalization = mail.Personalization()
    for kind, recipients in places.items():
        for recipient in recipients:
            personalization.add_email(_email(_PLACES[kind], recipient.mailbox))
    personalization.subject = message.subject
    for name, value in message.headers.items():
        personalization.add_header(mail.Header(name, _header_value(value)))
    personalization.add_header(mail.Header("Message-ID", message.message_id))
    personalization.add_custom_arg(mail.CustomArg(ATTEMPT, message.attempt))
    return _Letter(message, places, msgspec.json.encode(personalization.get()))


def _email(role: Any, mailbox: Mailbox) -> Any:
    """Set field by field: the package's constructor would parse an address without a name once more."""
    email = role()
    email.email = mailbox.address
    email.name = mailbox.name or None
    return email


def _header_value(text: str) -> str:
    """SendGrid takes ASCII only; encoded words (RFC 2047) are the sender's business."""
    return text if text.isascii() else MimeHeader(text, "utf-8").encode(linesep="")


# --- answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Nothing of a request was taken, because of what stands in it. `errors` are SendGrid's: a field, if any, and words.

    `is_final` False: it is not SendGrid's own word, so that trying again later may help.
    """

    response: str
    errors: list[tuple[str, str]]
    is_final: bool = True


def _without(request: _Request, refusal: _Refusal, results: dict[UUID, Result]) -> list[_Request]:
    """Settle those whom a refusal is about; the requests that carry the others."""
    outcome = Outcome.REFUSED if refusal.is_final else Outcome.DEFERRED
    letters = request.letters
    shared = [words for where, words in refusal.errors if _is_shared(where)]
    if shared or (len(letters) == 1 and not _named(request, refusal)):
        request.settle(Result(outcome, Scope.MESSAGE, shared[0] if shared else refusal.response), results)
        return []
    named = _named(request, refusal)
    if not named:
        half = len(letters) // 2
        return [_Request(request.shared, letters[:half]), _Request(request.shared, letters[half:])]
    others: list[_Letter] = []
    for number, letter in enumerate(letters):
        faults = named.get(number, {})
        if None in faults:
            _settle(letter, Result(outcome, Scope.MESSAGE, faults[None]), results)
        elif faults:
            results.update((each, Result(outcome, Scope.RECIPIENT, words)) for each, words in faults.items() if each)
            left = [each for place in letter.places.values() for each in place if each.id not in faults]
            others += _letters(letter.message, left)
        else:
            others.append(letter)
    return [_Request(request.shared, others)] if others else []


def _named(request: _Request, refusal: _Refusal) -> dict[int, dict[UUID | None, str]]:
    """Whose fault it is: the letter's number, and in it the recipients by id, or None for the letter itself."""
    named: dict[int, dict[UUID | None, str]] = {}
    for where, words in refusal.errors:
        match = _NAMED.fullmatch(where)
        if match is None or int(match[1]) >= len(request.letters):
            continue
        number = int(match[1])
        place = request.letters[number].places.get(Kind(match[2]), []) if match[2] else []
        position = int(match[3] or 0)
        named.setdefault(number, {})[place[position].id if position < len(place) else None] = words
    return named


def _errors(body: bytes) -> list[tuple[str, str]]:
    """Field and words of each error; empty if this is no error body of SendGrid's."""
    try:
        found = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return []
    return [("" if error.field in {None, "null"} else error.field or "", error.message) for error in found.errors]


def _is_shared(where: str) -> bool:
    """Whether an error's field is one that all messages of a request have in common."""
    return where.partition(".")[0] in {"from", "reply_to", "content"}


class _Error(msgspec.Struct):
    message: str = ""
    field: str | None = None


class _ErrorBody(msgspec.Struct):
    errors: list[_Error]


def _wait(headers: Mapping[str, str]) -> timedelta | None:
    """Until the rate limit is reset, by the server's clock, from a second to MAX_PAUSE; None if no header says."""
    try:
        if "X-RateLimit-Reset" in headers:
            now = parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else time.time()
            wait = timedelta(seconds=float(headers["X-RateLimit-Reset"]) - now)
        else:
            wait = timedelta(seconds=float(headers["Retry-After"]))
    except (KeyError, ValueError, OverflowError):
        return None
    return min(max(wait, timedelta(seconds=1)), MAX_PAUSE)


def _lost(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "gave no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "closed the connection without an answer"
    if isinstance(error, aiohttp.ClientResponseError):
        return "answered with something that is no HTTP"
    words = error.strerror if isinstance(error, OSError) else None
    return f"the connection was lost before an answer: {words or type(error).__name__}"


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("SENDGRID_URL: write a URL such as https://api.sendgrid.com")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError("SENDGRID_URL: an API key is never sent without TLS: write https://")
    return f"{url.rstrip('/')}/v3/mail/send"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
