"""What an operator asks and decides: `neoforge why`, `uncertain list|resend|confirm` and `reconcile`, as processes."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest

from neoforge_email.lifecycle import EventType
from neoforge_email.providers.base import Outcome

from .test_cli import Run, neoforge
from .test_settlement import Way, way

__all__ = ["neoforge", "way"]  # fixtures


@pytest.fixture
def ask(neoforge: Run) -> Any:
    """Run the command while the test's own tasks go on: `code, lines, errors = await ask("why", …)`."""

    async def run(*arguments: str) -> tuple[int, list[str], str]:
        done = await asyncio.to_thread(neoforge, *arguments)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


async def lost(way: Way, *, on_uncertain: str = "hold") -> str:
    """A message whose worker was lost in its attempt, swept: it is held, or due again."""
    await way.accept("ada@example.net", "bob@example.net", on_uncertain=on_uncertain)
    claimed = await way.attempt()
    await way.lose()
    await way.sweep()
    return str(claimed.message.id)


async def never_begun(way: Way) -> str:
    """A message that is held before any attempt."""
    await way.accept()
    return str(
        await way.superuser.fetchval(
            "update email_queue set state = 'held', held_reason = 'unreadable' where state = 'queued' returning id"
        )
    )


async def test_why_tells_the_sentence_the_recipients_and_the_timeline(way: Way, ask: Any) -> None:
    email_id = await lost(way)
    code, lines, _ = await ask("why", f"<{email_id.replace('-', '')}@example.com>")
    assert code == 0
    assert lines[0].startswith("Held for")
    assert f"`neoforge uncertain confirm {email_id}` says that it arrived" in lines[0]
    assert lines[1] == ""
    assert lines[2:4] == ["…@example.net: uncertain"] * 2
    assert [line.split()[2] for line in lines[5:]] == ["accepted", "attempt", "uncertain", "uncertain", "held", "held"]
    assert "ada" not in "".join(lines)
    code, lines, _ = await ask("why", email_id, "--json")
    report = json.loads(lines[0])
    assert (code, report["state"], len(report["recipients"]), len(report["timeline"])) == (0, "held", 2, 6)
    assert "ada" not in lines[0]


async def test_why_says_that_there_is_no_such_message_or_no_such_name(ask: Any) -> None:
    code, lines, _ = await ask("why", str(uuid4()))
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("There is no message")
    code, _, errors = await ask("why", "order-4711")
    assert (code, "names no message" in errors) == (2, True)


async def test_what_is_undecided_is_listed_without_addresses(way: Way, ask: Any) -> None:
    assert await ask("uncertain", "list") == (0, [], "")
    held = await lost(way)
    code, [line], _ = await ask("uncertain", "list")
    assert code == 0
    assert line.split()[0] == held
    assert line.split()[3:8] == ["held", "hold", "sendgrid", "shop", "2"]
    assert line.endswith("it is not known whether it was sent, and its policy is to hold")
    assert "example" not in line
    await way.accept()
    await way.attempt()
    await way.lose(waits=True)
    rows = json.loads((await ask("uncertain", "list", "--json"))[1][0])
    assert [(row["state"], row["policy"], row["recipients"]) for row in rows] == [
        ("held", "hold", 2),
        ("uncertain", "resend", 1),
    ]
    assert len((await ask("uncertain", "list", "--most", "1"))[1]) == 1


async def test_what_is_resent_is_due_at_once_and_what_is_not_says_why(way: Way, ask: Any) -> None:
    first, unknown = await lost(way), str(uuid4())
    await way.accept()
    queued = str(await way.superuser.fetchval("select id from email_queue where state = 'queued'"))
    code, lines, _ = await ask("uncertain", "resend", first, queued, unknown, first)
    assert code == 1
    assert lines == [
        f"{first}  will be sent",
        f"{queued}  left as it is: it is queued, and moves without you",
        f"{unknown}  left as it is: it is not in the queue: it is finished, or there is no such message",
    ]
    assert await way.events(EventType.RELEASED) == 2
    assert await way.superuser.fetchval("select count(*) from email_queue where state = 'queued' and due <= now()") == 2


async def test_all_that_is_held_is_resent_where_one_says_yes(way: Way, ask: Any) -> None:
    ids = {await lost(way), await never_begun(way)}
    code, _, errors = await ask("uncertain", "resend", "--all-held")
    assert (code, "--yes" in errors) == (2, True)
    for arguments in ([], ["--all-held", "--yes", str(uuid4())], ["nonsense"]):
        assert (await ask("uncertain", "resend", *arguments))[0] == 2
    code, lines, _ = await ask("uncertain", "resend", "--all-held", "--yes")
    assert (code, {line.split()[0] for line in lines}) == (0, ids)
    assert await ask("uncertain", "resend", "--all-held", "--yes") == (0, [], "")


async def test_what_is_confirmed_counts_as_sent_and_what_never_began_cannot_be(way: Way, ask: Any) -> None:
    maybe, never = await lost(way), await never_begun(way)
    code, lines, _ = await ask("uncertain", "confirm", maybe, never)
    assert code == 1
    assert lines == [
        f"{maybe}  counts as sent",
        f"{never}  left as it is: no attempt on it can have been taken, so it cannot have arrived; resend it",
    ]
    assert sorted(await way.statuses()) == ["queued", "sent", "sent"]
    assert (await ask("uncertain", "confirm"))[0] == 2
    code, [line], _ = await ask("uncertain", "confirm", maybe)
    assert (code, "not in the queue" in line) == (1, True)


async def test_reconcile_prints_what_is_stuck_and_status_counts_it(way: Way, ask: Any) -> None:
    await way.accept()
    await way.answer(await way.attempt(), Outcome.TAKEN)
    assert await ask("reconcile") == (0, [], "Nothing is stuck.\n")
    await way.accept()
    email_id = str(await way.superuser.fetchval("delete from email_queue returning id"))
    code, [line], errors = await ask("reconcile")
    assert (code, errors) == (1, "1 found.\n")
    assert line.split()[:2] == ["recipient_without_queue", email_id]
    code, [line], _ = await ask("reconcile", "--json")
    assert (code, json.loads(line)["id"]) == (1, email_id)
    assert not any("stuck" in fault for fault in json.loads((await ask("status", "--json"))[1][0])["faults"])
    await way.superuser.execute(
        "insert into stuck_rows (kind, id, part, what, found_at, checked_at) values ('never_due', $1, 'queue', '', now(), now())",
        email_id,
    )
    report = json.loads((await ask("status", "--json"))[1][0])
    assert report["stuck"]["never_due"] == 1
    assert "never_due: 1 rows are stuck; see `neoforge reconcile`" in report["faults"]


async def test_status_fails_where_something_is_held(way: Way, ask: Any) -> None:
    await lost(way)
    code, lines, _ = await ask("status")
    assert code == 1
    assert any(line.split()[:3] == ["queue", "held", "1"] and line.endswith("waits for you") for line in lines)
