"""The `neoforge` command, as a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from neoforge_email.lifecycle import QueueState
from tests.support import Database

from .test_api_process import NEOFORGE, Served, base_environment, serve, stored

__all__ = ["serve"]  # a fixture

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def neoforge(environment: dict[str, str]) -> Run:
    """`neoforge("keys", "list", NAME="value")`: run it to its end, in the environment of the tests with changes."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NEOFORGE, *arguments],
            env={**base_environment(), **environment, **variables},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "worker",
        "bounces",
        "migrate",
        "keys create",
        "keys list",
        "keys revoke",
        "send",
        "status",
        "why",
        "uncertain list",
        "uncertain resend",
        "uncertain confirm",
        "reconcile",
    ],
)
def test_every_command_has_help_with_an_example(neoforge: Run, command: str) -> None:
    done = neoforge(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "Example: " in " ".join(done.stdout.split())
    assert command.split(maxsplit=1)[0] in neoforge("--help").stdout


def test_settings_that_cannot_be_used_are_named_a_line_each(neoforge: Run) -> None:
    done = neoforge("serve", DATABASE_URL="mysql://x", REDIS_URL="", SMTP_PORT="many")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert {line.partition(":")[0] for line in lines} == {"DATABASE_URL", "REDIS_URL", "SMTP_PORT"} | (
        {"DATABASE_MIGRATE_URL", "DATABASE_READ_URL"} & {line.partition(":")[0] for line in lines}
    )


def test_a_database_that_is_away_is_one_line(neoforge: Run) -> None:
    url = "postgresql://neoforge_migrator@127.0.0.1:1/none"
    for command in (["migrate"], ["keys", "list"], ["status"]):
        done = neoforge(*command, DATABASE_MIGRATE_URL=url)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: PostgreSQL at 127.0.0.1 cannot be reached")


def test_migrate_says_what_it_did_and_a_second_time_that_there_is_nothing_to_do(
    neoforge: Run, empty_database: Database
) -> None:
    first = neoforge("migrate", DATABASE_MIGRATE_URL=empty_database.migrator)
    assert first.returncode == 0, first.stderr
    assert "Schema: empty -> " in first.stdout
    assert "Functions installed." in first.stdout
    second = neoforge("migrate", DATABASE_MIGRATE_URL=empty_database.migrator)
    assert second.returncode == 0
    assert second.stdout.startswith("Nothing to do")


def test_a_key_is_shown_once_listed_and_revoked(neoforge: Run) -> None:
    made = neoforge("keys", "create", "--user", "shop", "--name", "checkout")
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert len(secret) == 46
    assert secret.startswith("nf_")
    listed = neoforge("keys", "list", "--user", "shop").stdout
    assert secret not in listed
    assert secret[:11] in listed
    assert "checkout" in listed
    assert "active" in listed
    key_id = listed.split()[0]
    for _ in range(2):
        assert neoforge("keys", "revoke", key_id).returncode == 0
    assert "revoked" in neoforge("keys", "list").stdout
    assert neoforge("keys", "list", "--user", "nobody").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "--user", "two words"], "user's name"),
        (["create", "--user", "shop", "--name", ""], "key's name"),
        (["revoke", "4711"], "no API key with the id 4711"),
    ],
)
def test_keys_refuses_with_one_line(neoforge: Run, arguments: list[str], says: str) -> None:
    done = neoforge("keys", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_send_prints_the_id_and_what_became_of_the_message(
    neoforge: Run, serve: Callable[..., Served], database: Database
) -> None:
    served = serve()
    common = ["send", "--url", served.url, "--subject", "Hello", "--to", "ada@example.net"]
    done = neoforge(*common, "--to", "bob@example.net", "--text", "-", stdin="It works.", NEOFORGE_API_KEY=served.key)
    assert done.returncode == 0, done.stderr
    assert {done.stdout.strip()} == stored(database)

    late = neoforge(*common, "--text", "x", "--wait", "0.5", NEOFORGE_API_KEY=served.key)
    assert late.returncode == 1
    assert "no outcome within 0.5 seconds; the message is queued" in late.stderr

    worked = neoforge("worker", "--burst", DATABASE_URL=database.worker)
    assert worked.returncode == 0, worked.stderr
    assert stored(database) == set()

    refused = neoforge("send", "--url", served.url, "--subject", "a\nb", "--to", "nobody", NEOFORGE_API_KEY=served.key)
    assert refused.returncode == 1
    assert "to[0]: " in refused.stderr
    assert "subject: " in refused.stderr
    wrong = neoforge(*common, "--text", "x", NEOFORGE_API_KEY="nf_wrong")
    assert (wrong.returncode, "Bearer" in wrong.stderr) == (1, True)
    away = neoforge(
        "send", "--url", "http://127.0.0.1:1", "--subject", "x", "--to", "a@b.example", NEOFORGE_API_KEY="k"
    )
    assert (away.returncode, "cannot be reached" in away.stderr) == (1, True)


def test_status_counts_the_queue_and_fails_where_no_worker_listens(neoforge: Run) -> None:
    done = neoforge("status", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert {row["state"]: row["size"] for row in report["queue"]} == dict.fromkeys(QueueState, 0)
    assert {row["size"] for row in report["receipts"]} == {0}
    assert {row["state"]: row["size"] for row in report["webhooks"]} == dict.fromkeys(
        ("pending", "overdue", "leased", "dead"), 0
    )
    assert report["faults"] == ["no worker is known to listen"]
    assert report["workers_listening"] == 0
    assert "workers listening: 0" in neoforge("status").stdout
    away = neoforge("status", REDIS_URL="redis://127.0.0.1:1/0")
    assert (away.returncode, "Redis cannot be reached" in away.stdout) == (1, True)
