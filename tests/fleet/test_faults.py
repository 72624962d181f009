"""SIGKILL while 500 messages are under way; systemd brings the process back, and every message arrives."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter

import pytest

from .conftest import Edge, Fleet

MESSAGES = 500
KILL_AT = (150, 350)
UNITS = {
    "redis": "redis-server*",
    "worker": "neoforge-worker@*",
    "api": "neoforge-api",
    "postgresql": "postgresql@*",
}


@pytest.mark.parametrize("victim", list(UNITS))
def test_every_message_arrives_though_a_process_is_killed(
    fleet: Fleet, edge: Edge, victim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.wait_for_empty_queue(60)
    before = len(fleet.arrivals())
    run = f"{victim}-{int(time.time())}"
    machine = fleet.groups[victim][0]
    kills = list(KILL_AT)
    last = ""
    with subprocess.Popen(
        ["ssh", *fleet.ssh_options, fleet.outsider, "python3 /root/client.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(edge.load(run, MESSAGES, seconds=3, patience_seconds=50))
        client.stdin.close()
        for last in client.stdout:
            if kills and last.startswith("accepted ") and int(last.split()[1]) >= kills[0]:
                kills.pop(0)
                fleet.ok(machine, f"systemctl kill --signal=KILL '{UNITS[victim]}'")
        assert client.wait(30) == 0
    assert not kills
    result = json.loads(last)

    assert result["failures"] == []
    assert len(result["ids"]) == len(set(result["ids"].values())) == MESSAGES
    drained = fleet.wait_for_empty_queue(150)
    arrived = Counter(
        recipient
        for mail in fleet.arrivals()[before:]
        for recipient in mail["recipients"]
        if recipient.startswith(f"{run}-")
    )
    missing = sorted(set(result["ids"]) - set(arrived))
    duplicates = sum(arrived.values()) - len(arrived)
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{victim}: {MESSAGES} accepted in {result['seconds']} s, repeats {result['repeats']}, queue empty "
            f"{drained:.1f} s later, missing {len(missing)}, duplicates {duplicates}"
        )
    assert missing == []
    message_ids = {mail["message_id"] for mail in fleet.arrivals()[before:]}
    assert {email_id.replace("-", "") for email_id in result["ids"].values()} == {
        message_id.strip("<>").split("@")[0] for message_id in message_ids
    }
    state = fleet.ok(machine, "systemctl --failed --no-legend").strip()
    assert state == ""
