"""A provider that keeps what it takes in memory: for tests and trials, nothing leaves the process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from neoforge_email import mime
from neoforge_email.dkim import Signer
from neoforge_email.errors import ProviderUnavailable
from neoforge_email.message import Message, Recipient
from neoforge_email.providers.base import NOT_STARTED, Outcome, Result, Scope, windows

KEPT_MESSAGES = 10_000

TAKEN = Result(Outcome.TAKEN, Scope.MESSAGE, "250 kept in memory")


@dataclass(frozen=True, slots=True)
class Taken:
    """A message as it was sent; `recipients` are those that were taken, `content` is its MIME form."""

    message: Message
    recipients: tuple[Recipient, ...]
    content: bytes


def take(_message: Message, _recipient: Recipient) -> Result:
    return TAKEN


class MemoryProvider:
    """Takes everything unless `answer` says otherwise; set `unavailable` to a reason to make it unreachable.

    `taken` holds the newest KEPT_MESSAGES messages. `delay` is waited before each answer.
    """

    name = "memory"
    reports = False

    def __init__(
        self,
        *,
        window: int = 10,
        connections: int = 8,
        timeout: timedelta = timedelta(seconds=30),
        delay: timedelta = timedelta(0),
        answer: Callable[[Message, Recipient], Result] = take,
        signer: Signer | None = None,
    ) -> None:
        self.window = window
        self.connections = connections
        self.timeout = timeout
        self.delay = delay
        self.answer = answer
        self.taken: deque[Taken] = deque(maxlen=KEPT_MESSAGES)
        self.unavailable: str | None = None
        self._signer = signer
        self._slots = asyncio.Semaphore(connections)

    def calls(self, messages: Sequence[Message]) -> list[list[Message]]:
        return windows(messages, self.window)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[MemoryProvider]:
        async with self._slots:
            if self.unavailable is not None:
                raise ProviderUnavailable(self.unavailable)
            yield self

    async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        """See `base.Connection.send`; the body follows the commands at once, so `may_start` is asked once a message."""
        results: list[tuple[Result, ...]] = []
        for message in window:
            if not may_start():
                break
            if self.delay:
                await asyncio.sleep(self.delay.total_seconds())
            results.append(self._one(message))
        results.extend((NOT_STARTED,) * len(message.open_recipients) for message in window[len(results) :])
        return results

    def _one(self, message: Message) -> tuple[Result, ...]:
        recipients = message.open_recipients
        try:
            content = mime.build(message, self._signer)
        except ValueError as error:
            return (Result(Outcome.REFUSED, Scope.MESSAGE, f"cannot be written as mail: {error}"[:500]),) * len(
                recipients
            )
        answers = tuple(self.answer(message, recipient) for recipient in recipients)
        taken = tuple(r for r, answer in zip(recipients, answers, strict=True) if answer.outcome is Outcome.TAKEN)
        if taken:
            self.taken.append(Taken(message, taken, content))
        return answers

    async def close(self) -> None:
        """Nothing is kept open; `taken` stays."""
