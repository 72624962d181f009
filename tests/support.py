"""What tests share beside fixtures: a test's own database and a message to send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

from neoforge_email.mailbox import Store
from neoforge_email.message import Kind, Mailbox, Message, Recipient
from neoforge_email.settings import DatabaseUrl


@dataclass(frozen=True, slots=True)
class Server:
    """A PostgreSQL server by its superuser's URL; every role logs in with the superuser's password, if there is one."""

    superuser: str

    def dsn(self, user: str | None, database: str) -> str:
        """A URL for `DATABASE_URL`; `user` None is the superuser."""
        parts = urlsplit(self.superuser)
        credentials, _, host = parts.netloc.rpartition("@")
        _, colon, password = credentials.partition(":")
        given = credentials if user is None else f"{user}{colon}{password}"
        return urlunsplit(parts._replace(netloc=f"{given}@{host}", path=f"/{database}"))


@dataclass(frozen=True, slots=True)
class Database:
    """A migrated database of one test, as each of its roles reaches it."""

    server: Server
    name: str

    @property
    def superuser(self) -> str:
        return self.server.dsn(None, self.name)

    @property
    def migrator(self) -> str:
        return self.server.dsn("neoforge_migrator", self.name)

    @property
    def api(self) -> str:
        return self.server.dsn("neoforge_api", self.name)

    @property
    def worker(self) -> str:
        return self.server.dsn("neoforge_worker", self.name)

    @staticmethod
    def url(dsn: str) -> DatabaseUrl:
        """As `db.connect` and `db.migrate` take it."""
        return DatabaseUrl.parse(dsn)


@dataclass(frozen=True, slots=True)
class Sink:
    """A listening SMTP server and what has arrived there."""

    store: Store
    port: int


SENDER = Mailbox("shop@example.com", "Shop")
CREATED_AT = datetime(2026, 3, 1, 12, 30, 15, 250000, tzinfo=UTC)


def a_message(
    *,
    sender: Mailbox = SENDER,
    reply_to: Mailbox | None = None,
    subject: str = "Your order",
    headers: Mapping[str, str] | None = None,
    html: str | None = None,
    text: str | None = "It has left.",
    to: Sequence[str | Mailbox] = ("ada@example.net",),
    cc: Sequence[str | Mailbox] = (),
    bcc: Sequence[str | Mailbox] = (),
    closed: Sequence[str] = (),
    lease_no: int = 1,
    email_id: UUID | None = None,
    created_at: datetime = CREATED_AT,
) -> Message:
    """A leased message; recipients whose address is in `closed` are finished already."""
    recipients = []
    for kind, mailboxes in ((Kind.TO, to), (Kind.CC, cc), (Kind.BCC, bcc)):
        for given in mailboxes:
            mailbox = Mailbox(given) if isinstance(given, str) else given
            recipients.append(Recipient(uuid4(), kind, mailbox, mailbox.address not in closed))
    return Message(
        id=email_id or uuid4(),
        created_at=created_at,
        user_id=1,
        lease_no=lease_no,
        sender=sender,
        reply_to=reply_to,
        subject=subject,
        headers=headers or {},
        html=html,
        text=text,
        recipients=tuple(recipients),
    )
