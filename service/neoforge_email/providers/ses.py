"""Amazon SES: `SendEmail` of its API v2 with our own MIME as raw content, one message a call.

SES puts a Message-ID and a Date of its own in the place of ours, which would break a DKIM signature over them: it signs
by itself (Easy DKIM), and our key is not used. What tells an attempt again in its events is the tag `neoforge_attempt`
of the configuration set's events; the header X-NeoForge-Attempt arrives too.

What an error means (https://docs.aws.amazon.com/ses/latest/APIReference-V2/API_SendEmail.html, CommonErrors.html):
throttled, or an account, key or configuration that is not in order, is a definite no that no message is to blame for;
BadRequestException and MessageRejected are about the message; after a 5xx, a lost connection or a time-out nobody knows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from neoforge_email import mime
from neoforge_email.errors import FieldError, ProviderUnavailable
from neoforge_email.message import Draft, Message
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope, windows

if TYPE_CHECKING:
    from neoforge_email.providers.ses_client import Failure

ATTEMPT_TAG = "neoforge_attempt"
MAX_SIZE_BYTES = 40 * 1024 * 1024  # of a message in base64, as the API carries it
RATE_WAIT = timedelta(seconds=1)
QUOTA_WAIT = timedelta(minutes=10)  # the quota counts the last 24 hours, so some of it comes back soon

_THROTTLED = {
    "TooManyRequestsException",
    "LimitExceededException",
    "ThrottlingException",
    "Throttling",
    "RequestLimitExceeded",
}
_BAD_REQUEST = {"BadRequestException", "ValidationException", "ValidationError", "InvalidParameterValue"}
# Comes as MessageRejected, and an operator can make it go away.
_ABOUT_THE_SENDER = re.compile(r"not verified|sending (suspended|paused)", re.IGNORECASE)
_SPACES = re.compile(r"[\x00-\x1f\x7f-\x9f\s]+")


def unsupported(draft: Draft) -> list[FieldError]:
    """What SES cannot do for this message, by field of the request."""
    errors: list[FieldError] = [
        {"field": f"headers.{name}", "message": "remove it: Amazon SES takes headers of this name as orders"}
        for name in draft.headers
        if name.lower().startswith("x-ses-")
    ]
    octets = sum(len(text.encode()) for text in (draft.html, draft.text) if text is not None)
    # Twice base64 with line ends: of a part that is not ASCII, and of the whole.
    if octets * 16 // 9 * 78 // 76 > MAX_SIZE_BYTES:
        errors.append({"field": "html" if draft.html else "text", "message": "too large: Amazon SES takes 40 MB"})
    return errors


class SesProvider:
    """One region of one account; see `base.Provider`. Without a key the usual AWS sources are asked (instance role).

    `endpoint_url` replaces the region's own endpoint. `reports` says whether events come back: whoever makes this knows.
    """

    name = "ses"
    window = 1

    def __init__(
        self,
        *,
        region: str,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        endpoint_url: str | None = None,
        configuration_set: str | None = None,
        timeout: timedelta = timedelta(seconds=30),
        connections: int = 8,
        reports: bool = False,
    ) -> None:
        self.connections = connections
        self.timeout = timeout
        self.reports = reports
        self._configuration_set = configuration_set
        self._secrets = [secret for secret in (secret_access_key, access_key_id) if secret]
        self._options: dict[str, Any] = {
            "region": region,
            "access_key_id": access_key_id,
            "secret_access_key": secret_access_key,
            "endpoint_url": endpoint_url,
            "timeout": timeout,
            "connections": connections,
        }
        self._slots = asyncio.Semaphore(connections)
        self._opening = asyncio.Lock()
        self._client: Any = None
        self._resources = AsyncExitStack()
        self._in_use = 0
        self._is_closed = False

    def calls(self, messages: Sequence[Message]) -> list[list[Message]]:
        return windows(messages, self.window)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[SesConnection]:
        """See `base.Provider.connection`. HTTP connects when it sends, so an unreachable SES shows there."""
        async with self._slots:
            self._in_use += 1
            try:
                yield SesConnection(await self._opened(), self.timeout, self._configuration_set, self._without_secrets)
            finally:
                self._in_use -= 1
                await self._close_if_unused()

    async def _opened(self) -> Any:
        async with self._opening:
            if self._client is None:
                from neoforge_email.providers import ses_client  # a third of a second and 50 MB

                try:
                    self._client = await self._resources.enter_async_context(ses_client.create(**self._options))
                except (ValueError, ses_client.BotoCoreError) as error:
                    raise ProviderUnavailable(f"Amazon SES cannot be used: {self._without_secrets(error)}") from None
            return self._client

    async def close(self) -> None:
        """See `base.Provider.close`."""
        self._is_closed = True
        await self._close_if_unused()

    async def _close_if_unused(self) -> None:
        if self._is_closed and not self._in_use:
            self._client = None
            await self._resources.aclose()

    def _without_secrets(self, words: object) -> str:
        """One line of at most 500 characters. A wrong signature is answered with the signed request, below the first line."""
        text = _SPACES.sub(" ", str(words).strip().partition("\n")[0])
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:500]


@dataclass(frozen=True, slots=True)
class SesConnection:
    """The right to one call at a time; see `base.Connection`."""

    client: Any = field(repr=False)
    timeout: timedelta
    configuration_set: str | None
    words: Callable[[object], str] = field(repr=False)

    async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        """See `base.Connection.send`; a message is one request, so `may_start` is asked once for it."""
        return [await self._one(message, may_start) for message in window]

    async def _one(self, message: Message, may_start: Callable[[], bool]) -> tuple[Result, ...]:
        recipients = [recipient.mailbox.address for recipient in message.open_recipients]
        try:
            content = mime.build(message)
        except ValueError as error:
            words = self.words(f"cannot be written as mail: {error}")
            return (Result(Outcome.REFUSED, Scope.MESSAGE, words),) * len(recipients)
        return tuple(await self._to(recipients, message, content, may_start)) if recipients else ()

    async def _to(
        self, recipients: list[str], message: Message, content: bytes, may_start: Callable[[], bool]
    ) -> list[Result]:
        """SES refuses a whole message for one bad address. Nothing was taken then, so each half is asked for again."""
        if not may_start():
            return [NOT_STARTED] * len(recipients)
        result, is_bad_request = await self._call(recipients, message, content)
        if is_bad_request and len(recipients) > 1:
            middle = len(recipients) // 2
            return [
                *await self._to(recipients[:middle], message, content, may_start),
                *await self._to(recipients[middle:], message, content, may_start),
            ]
        return [result] * len(recipients)

    async def _call(self, recipients: list[str], message: Message, content: bytes) -> tuple[Result, bool]:
        """What became of one request, and whether it was refused for what stands in it."""
        from neoforge_email.providers import ses_client

        answer = await ses_client.send_email(
            self.client,
            self.timeout,
            # With a destination given, the addresses in the content's headers are only shown.
            Destination={"ToAddresses": recipients},
            FromEmailAddress=message.sender.address,
            Content={"Raw": {"Data": content}},
            EmailTags=[{"Name": ATTEMPT_TAG, "Value": message.attempt}],
            **({"ConfigurationSetName": self.configuration_set} if self.configuration_set else {}),
        )
        if isinstance(answer, str):
            return Result(Outcome.TAKEN, Scope.MESSAGE, f"200 taken as {self.words(answer)}"[:500], answer), False
        result = replace(_meaning(answer), response=self.words(answer.words))
        return result, answer.code in _BAD_REQUEST


def _meaning(failure: Failure) -> Result:
    """Whose fault a failure is, and whether it is known that nothing was taken."""
    code, status = failure.code, failure.status
    if status is None:  # no answer
        return UNCERTAIN if failure.written else NOT_TAKEN
    if code in _THROTTLED or status == 429:
        wait = QUOTA_WAIT if "quota" in failure.words.lower() else RATE_WAIT
        return replace(NOT_TAKEN, retry_after=failure.retry_after or wait)
    if status >= 500:
        return UNCERTAIN
    if code in _BAD_REQUEST or code == "MessageRejected" or status == 413:
        return LATER if _ABOUT_THE_SENDER.search(failure.words) else REFUSED
    # A code that nobody knows may be about the message: it uses up its retries, and does not stop the others.
    return LATER if status == 400 and code and code not in _ABOUT_THE_ACCOUNT else NOT_TAKEN


_ABOUT_THE_ACCOUNT = {
    "AccountSuspendedException",
    "SendingPausedException",
    "MailFromDomainNotVerifiedException",
    "NotFoundException",  # the configuration set
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
    "AccessDenied",
    "AccessDeniedException",
    "NotAuthorized",
    "OptInRequired",
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "InvalidAction",
    "UnknownOperationException",
}

UNCERTAIN = Result(Outcome.UNCERTAIN, Scope.MESSAGE, "")
NOT_TAKEN = Result(Outcome.DEFERRED, Scope.CONNECTION, "")
REFUSED = Result(Outcome.REFUSED, Scope.MESSAGE, "")
LATER = Result(Outcome.DEFERRED, Scope.MESSAGE, "")
