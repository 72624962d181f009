"""No secret leaves the place that it is for, and no log of PostgreSQL holds what a message says or whom it is for."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

import pytest

from .conftest import INVENTORY, ROOT, Edge, Fleet
from .vault import Vault

PROGRAM = (Path(__file__).parent / "leaks.py").read_text()
# What a service reads as a member of its group, and by design nobody else.
READ_BY_GROUP = re.compile(r"^/etc/(redis/users-(queue|cache)\.acl|pgbackrest/conf\.d/secrets\.conf)$")


@pytest.fixture(scope="module")
def vault(fleet: Fleet) -> Vault:
    return Vault(fleet.secrets_file)


def found(fleet: Fleet, machine: str, needles: dict[str, list[str]]) -> list[tuple[str, str]]:
    fleet.ok(machine, "umask 077; cat >/root/leaks.py", PROGRAM)
    answer = json.loads(
        fleet.ok(machine, "python3 /root/leaks.py; rm /root/leaks.py", json.dumps(needles), seconds=300)
    )
    return [(name, where) for name, where in answer]


def test_no_secret_is_found_on_a_machine_but_where_it_is_read(fleet: Fleet, vault: Vault, each_machine: str) -> None:
    leaks = found(fleet, each_machine, vault.needles())
    assert [leak for leak in leaks if not READ_BY_GROUP.match(leak[1])] == []


def test_the_search_finds_what_is_there(fleet: Fleet, each_machine: str) -> None:
    canary = secrets.token_urlsafe(32)
    fleet.ok(
        each_machine,
        'read -r line; logger "a canary: $line"; echo "$line" >/var/lib/canary; chmod 644 /var/lib/canary; journalctl --sync',
        canary + "\n",
    )
    places = {where for _, where in found(fleet, each_machine, {"canary": [canary]})}
    fleet.ok(each_machine, "rm /var/lib/canary")
    assert {"the journal", "/var/lib/canary"} <= places


def read(file: Path) -> str:
    """What a file says; nothing where another run has just removed it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


@pytest.mark.skipif("single" not in INVENTORY, reason="runs with -vvv --diff are made in the scenario of one machine")
def test_no_secret_is_in_what_ansible_said_with_vvv_and_diff(vault: Vault) -> None:
    logs = sorted(vault.runs.glob("*.log"))
    assert logs, f"no runs in {vault.runs}; tests.fleet.interrupted makes them"
    needles = vault.needles()
    assert [
        (log.name, name) for log in logs for name, texts in needles.items() if any(text in read(log) for text in texts)
    ] == []


def test_no_secret_is_in_a_file_of_the_controller_in_clear(vault: Vault) -> None:
    needles = [text for texts in vault.needles().values() for text in texts]
    places = [
        vault.file.parent,
        ROOT / ".cache",
        Path("~/.ansible").expanduser(),
        Path("~/.cache/ansible-compat").expanduser(),
    ]
    files = [file for place in places for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    assert [file for file in files if any(text in read(file) for text in needles)] == []


def test_no_log_of_postgresql_holds_a_message_or_an_address(fleet: Fleet, edge: Edge) -> None:
    """While every statement is logged, and with statements that fail."""
    word = f"canary{secrets.token_hex(8)}"
    database = fleet.groups["postgresql"][0]
    psql = "runuser -u postgres -- psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1"
    fleet.ok(database, psql, "alter system set log_min_duration_statement = 0; select pg_reload_conf();")
    try:
        message = {
            "to": f"{word}@example.com",
            "subject": f"Of {word}",
            "text": f"About {word}.",
            "metadata": {"order": word},
        }
        email = json.loads(edge.post(message, Idempotency_Key=word).text)
        assert edge.post({**message, "subject": "Another"}, Idempotency_Key=word).status == 409
        edge.delivered(email["id"])
    finally:
        fleet.ok(database, psql, "alter system reset log_min_duration_statement; select pg_reload_conf();")
    for machine in fleet.groups["postgresql"] + fleet.groups.get("replica", []):
        logged = fleet.ok(
            machine, "journalctl --unit='postgresql@*' --output=cat --quiet; cat /var/log/postgresql/*.log"
        )
        assert machine != database or "duration:" in logged
        assert word not in logged
