"""What providers report, in one form, whichever way it came: `sendgrid` and `ses` by webhook, `dsn` by mail."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from neoforge_email.lifecycle import EventType


@dataclass(frozen=True, slots=True)
class Event:
    """One fact about one recipient.

    `event_id` is unique within the provider. The message is named by `attempt` (`Message.attempt`) or, without one, by the
    provider's own id of it; without a `recipient` its only one is meant. `permanent` says of a bounce that the address is
    dead. `response` is one line of at most 500 characters.
    """

    provider: str
    event_id: str
    type: EventType
    occurred_at: datetime
    recipient: str | None = None
    attempt: str | None = None
    provider_message_id: str | None = None
    permanent: bool = False
    response: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)
