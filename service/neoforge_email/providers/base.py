"""What every provider is to the rest: connections that send windows of messages and say what became of each recipient."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from neoforge_email.message import Message


class Outcome(enum.StrEnum):
    """What a provider did with one recipient of a message."""

    TAKEN = "taken"
    REFUSED = "refused"  # permanent
    DEFERRED = "deferred"  # definitely not taken
    UNCERTAIN = "uncertain"  # the body was written and no answer came


class Scope(enum.StrEnum):
    """What an answer is about. CONNECTION (421, lost before the body, not started) uses up no retry of the message."""

    RECIPIENT = "recipient"
    MESSAGE = "message"
    CONNECTION = "connection"


@dataclass(frozen=True, slots=True)
class Result:
    """`response` holds the provider's words on one line of at most 500 characters.

    `provider_message_id` is the provider's own id of what it took; `retry_after` its word on when to come back.
    """

    outcome: Outcome
    scope: Scope
    response: str
    provider_message_id: str | None = None
    retry_after: timedelta | None = None


NOT_STARTED = Result(Outcome.DEFERRED, Scope.CONNECTION, "not started: the lease ends too soon or the worker stops")


def windows(messages: Sequence[Message], size: int) -> list[list[Message]]:
    """`Provider.calls` where a call takes any `size` messages."""
    return [list(messages[start : start + size]) for start in range(0, len(messages), size)]


class Connection(Protocol):
    """One kept connection, ready to send."""

    async def send(self, window: Sequence[Message], may_start: Callable[[], bool]) -> list[tuple[Result, ...]]:
        """Send messages in order; the answer has a tuple a message with a result per open recipient, in order.

        `may_start` is asked right before a message's first command and again right before its body is written, at one time for
        a body and the commands of the next message that go out with it. Once it says no, nothing more is written, and what was
        not written is DEFERRED/CONNECTION. From its last yes to the outcome no more than the provider's `timeout` passes.
        Never raises for what a server can do; cancelling it closes the connection.
        """


class Provider(Protocol):
    """`window`: most messages a call; `connections`: at once; `timeout`: longest wait for a message, which a lease must outlast.

    `reports`: events that carry the attempt come back, so that one may settle what a call left open.
    """

    name: str
    window: int
    connections: int
    timeout: timedelta
    reports: bool

    def calls(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Cut into what one `Connection.send` takes, in order; the attempts of a call are committed together."""

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """A kept connection or a new one; raises errors.ProviderUnavailable before anything was sent."""

    async def close(self) -> None:
        """Close the kept connections; those in use are closed when they are given back."""
