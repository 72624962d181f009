"""A message as the rest of the service hands it on: plain values, no database and no provider in them."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID


class Kind(enum.StrEnum):
    """In which header a recipient stands; `bcc` in none."""

    TO = "to"
    CC = "cc"
    BCC = "bcc"


@dataclass(frozen=True, slots=True)
class Mailbox:
    """`address` is an ASCII addr-spec (RFC 5321) with its domain in lower case; `name` has no CR, LF or NUL."""

    address: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Recipient:
    """One recipient of a message; `open` says that this attempt has to address it."""

    id: UUID
    kind: Kind
    mailbox: Mailbox
    open: bool


@dataclass(frozen=True, slots=True)
class Message:
    """A leased message; `lease_no` numbers the lease, and with it the attempt."""

    id: UUID
    created_at: datetime
    user_id: int
    lease_no: int
    sender: Mailbox
    reply_to: Mailbox | None
    subject: str
    headers: Mapping[str, str]
    html: str | None
    text: str | None
    recipients: tuple[Recipient, ...]

    @property
    def attempt(self) -> str:
        """The attempt's id, as it travels with the message so that provider events can name it.

        Letters, digits and a dash: fit for an SES tag and the local part of a return path.
        """
        return f"{self.id.hex}-{self.lease_no}"

    @property
    def message_id(self) -> str:
        """The `Message-ID` (RFC 5322, 3.6.4): the message's own, the same in every attempt."""
        return f"<{self.id.hex}@{self.sender.address.rpartition('@')[2]}>"

    @property
    def open_recipients(self) -> tuple[Recipient, ...]:
        return tuple(recipient for recipient in self.recipients if recipient.open)


_ATTEMPT = re.compile(r"([0-9a-f]{32})-([1-9][0-9]{0,8})")


def parse_attempt(text: str) -> tuple[UUID, int] | None:
    """The message's id and the number of the lease that `Message.attempt` names; None for anything else."""
    match = _ATTEMPT.fullmatch(text.lower())
    return (UUID(match[1]), int(match[2])) if match else None


Policy = Literal["resend", "hold"]
"""What happens to a message where it stays unknown whether a provider took it."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that has been validated and not yet been accepted. `lane` is the number of its priority."""

    user_id: int
    lane: int
    sender: Mailbox
    reply_to: Mailbox | None
    subject: str
    headers: dict[str, str]
    tags: list[str]
    metadata: dict[str, Any]
    html: str | None
    text: str | None
    recipients: list[tuple[Kind, Mailbox]]
    idempotency_key: str | None
    body_hash: bytes
    on_uncertain: Policy = "resend"
    content_id: UUID | None = None
    """Drafts of one request that share their bodies carry the same id; these are then stored once."""
