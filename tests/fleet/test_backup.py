"""Backups: each kind is made, can be read again with the operator's key alone, and says so when it could not be made."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .conftest import ROOT, Fleet
from .vault import Vault

KINDS = ["full", "differential", "wal", "schema", "dump", "redis", "configuration", "logs"]
PGBACKREST = "cd /; runuser -u postgres -- pgbackrest --stanza=main"
PSQL = "cd /; runuser -u postgres -- psql -XAtq -v ON_ERROR_STOP=1 -d"
# Where nothing of the system's own is; secrets that were laid down would be in one of these.
PLACES = "/etc /opt /root /home /srv /run /tmp /var /usr/local"


@pytest.fixture(scope="module")
def secrets(fleet: Fleet) -> dict[str, str]:
    """What the operator alone has."""
    found = Vault(fleet.secrets_file).read()
    return {"identity": found["backup_identity"], "cipher": found["backup_cipher"], "ca": found["ca_key"]}


@pytest.fixture(scope="module")
def keeper(fleet: Fleet) -> str:
    """The machine with the repository and the store."""
    return fleet.groups["monitoring"][0]


@pytest.fixture(scope="module")
def makers(fleet: Fleet, keeper: str) -> dict[str, list[str]]:
    """The machines that make each kind."""
    own = {kind: [keeper] for kind in KINDS}
    own["configuration"] = fleet.groups["fleet"]
    own["logs"] = sorted({*fleet.groups["api"], *fleet.groups["worker"]})
    return own


def make(fleet: Fleet, machine: str, kind: str) -> subprocess.CompletedProcess[str]:
    """Make a backup now, and wait until what became of it is written."""
    done = fleet.shell(machine, f"systemctl start neoforge-backup@{kind}", seconds=180)
    # The report is a job of its own, begun by the end of the backup.
    unit = f"neoforge-backup-report@{kind}-{'failure' if done.returncode else 'success'}.service"
    busy = f"systemctl list-jobs --no-legend {unit} | grep -q . || [ $(systemctl show -P SubState {unit}) != dead ]"
    fleet.ok(machine, f"while {busy}; do sleep 0.1; done")
    return done


@pytest.fixture(scope="module", autouse=True)
def made(fleet: Fleet, makers: dict[str, list[str]]) -> float:
    """Everything is backed up once; when that began."""
    began = float(fleet.ok(makers["full"][0], "date +%s"))
    for kind in KINDS:
        for machine in makers[kind]:
            done = make(fleet, machine, kind)
            assert done.returncode == 0, fleet.ok(machine, f"journalctl -n 20 -o cat -u neoforge-backup@{kind}")
    return began


def metrics(fleet: Fleet, machine: str, kind: str) -> tuple[float, int]:
    """When it succeeded last, and whether the last try failed, as the machine's exporter reads it."""
    text = fleet.ok(machine, f"cat /var/lib/prometheus/node-exporter/neoforge-backup-{kind}.prom")
    last = re.search(rf'^neoforge_backup_last_success_timestamp_seconds{{kind="{kind}"}} (\d+)$', text, re.MULTILINE)
    failed = re.search(rf'^neoforge_backup_failed{{kind="{kind}"}} ([01])$', text, re.MULTILINE)
    assert last, text
    assert failed, text
    return float(last[1]), int(failed[1])


def newest(fleet: Fleet, keeper: str, pattern: str) -> str:
    return fleet.ok(keeper, f"ls -t {pattern} | head -n 1").strip()


def read(fleet: Fleet, keeper: str, secrets: dict[str, str], pattern: str) -> bytes:
    """The newest backup of a name, decrypted; the operator's key travels on standard input and touches no disk."""
    file = newest(fleet, keeper, pattern)
    assert file, f"{pattern} is not there"
    return base64.b64decode(fleet.ok(keeper, f"age --decrypt --identity=- {file} | base64", secrets["identity"]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_made_and_its_success_is_a_metric(
    fleet: Fleet, makers: dict[str, list[str]], made: float, kind: str
) -> None:
    for machine in makers[kind]:
        last, failed = metrics(fleet, machine, kind)
        assert last >= made
        assert failed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_timer(fleet: Fleet, makers: dict[str, list[str]], kind: str) -> None:
    for machine in makers[kind]:
        timer = f"neoforge-backup@{kind}.timer"
        fleet.ok(machine, f"systemctl -q is-enabled {timer} && systemctl -q is-active {timer}")
        assert fleet.ok(machine, f"systemctl show -P NextElapseUSecRealtime {timer}").strip()


def test_prometheus_knows_of_every_success(fleet: Fleet, keeper: str) -> None:
    url = f"http://127.0.0.1:{fleet.ports['node_exporter']}/metrics"
    deadline = time.monotonic() + 10
    while True:
        text = fleet.ok(keeper, f"curl -s {url}")
        kinds = set(re.findall(r'^neoforge_backup_last_success_timestamp_seconds{kind="(\w+)"}', text, re.MULTILINE))
        if kinds >= set(KINDS) - {"logs"} or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert kinds >= set(KINDS) - {"logs"}


def info(fleet: Fleet, keeper: str) -> dict[str, Any]:
    """What pgBackRest says of its repository."""
    (stanza,) = json.loads(fleet.ok(keeper, f"{PGBACKREST} --output=json info"))
    assert stanza["status"]["code"] == 0, stanza["status"]
    found: dict[str, Any] = stanza
    return found


def test_the_repository_is_whole_and_encrypted(fleet: Fleet, keeper: str) -> None:
    stanza = info(fleet, keeper)
    assert {backup["type"] for backup in stanza["backup"]} >= {"full", "diff"}
    assert [backup for backup in stanza["backup"] if backup["error"]] == []
    assert stanza["cipher"] == "aes-256-cbc"
    fleet.ok(keeper, f"{PGBACKREST} verify")


def test_the_log_is_in_the_archive_within_a_minute(fleet: Fleet, keeper: str) -> None:
    """A segment with a change in it ends after 30 s; the rest is the way."""
    primary = fleet.groups["postgresql"][0]
    assert fleet.ok(primary, f"{PSQL} postgres -c 'show archive_timeout'").strip() == "30s"
    query = "select pg_logical_emit_message(true, 'test', 'x'); select pg_walfile_name(pg_current_wal_lsn())"
    segment = fleet.ok(primary, f"{PSQL} postgres", query).split()[-1]
    deadline = time.monotonic() + 60
    while str(info(fleet, keeper)["archive"][-1]["max"]) < segment:
        assert time.monotonic() < deadline, f"{segment} is not in the archive"
        time.sleep(2)


def test_a_dump_is_whole(fleet: Fleet, keeper: str, secrets: dict[str, str]) -> None:
    """A row of its time comes back out of it, in another database."""
    primary = fleet.groups["postgresql"][0]
    marker = uuid.uuid4().hex
    statement = f"create table fleet_test_marker as select '{marker}'::text as marker;"
    fleet.ok(primary, f"{PSQL} neoforge_prod", statement)
    try:
        if "replica" in fleet.groups:
            time.sleep(2)
        assert make(fleet, keeper, "dump").returncode == 0
        dump = base64.b64encode(
            read(fleet, keeper, secrets, "/opt/neoforge/backups/neoforge_full_*.backup.age")
        ).decode()
        table = fleet.ok(primary, "base64 -d | pg_restore --list", dump)
        assert "TABLE DATA public fleet_test_marker" in table
        assert "TABLE DATA public email_queue" in table
        fleet.ok(primary, f"{PSQL} postgres -c 'create database fleet_test_scratch template template0'")
        restore = "cd /; base64 -d | runuser -u postgres -- pg_restore --exit-on-error --dbname=fleet_test_scratch"
        fleet.ok(primary, restore, dump)
        assert fleet.ok(primary, f"{PSQL} fleet_test_scratch -c 'table fleet_test_marker'").strip() == marker
        # Of every user, although rows are each user's own.
        count = "-c 'select count(*) from api_keys'"
        assert fleet.ok(primary, f"{PSQL} fleet_test_scratch {count}") == fleet.ok(
            primary, f"{PSQL} neoforge_prod {count}"
        )
    finally:
        fleet.ok(primary, f"{PSQL} postgres -c 'drop database if exists fleet_test_scratch'")
        fleet.ok(primary, f"{PSQL} neoforge_prod -c 'drop table fleet_test_marker'")


def test_a_dump_comes_from_a_replica(fleet: Fleet, keeper: str) -> None:
    """On the primary its snapshot would slow down every claim."""
    if "replica" not in fleet.groups:
        pytest.skip("this inventory has no replica")
    count = "journalctl -q -o cat -u 'postgresql@*' | grep -c 'connection authorized: user=neoforge_backup' || true"
    replica, primary = fleet.groups["replica"][0], fleet.groups["postgresql"][0]
    before = [int(fleet.ok(machine, count)) for machine in (replica, primary)]
    assert make(fleet, keeper, "dump").returncode == 0
    after = [int(fleet.ok(machine, count)) for machine in (replica, primary)]
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_a_dump_has_both_names_of_the_guide(fleet: Fleet, keeper: str) -> None:
    short = newest(fleet, keeper, "/opt/backups/neoforge/neoforge_*.backup.age")
    target = fleet.ok(keeper, f"readlink -e {short}").strip()
    assert target == newest(fleet, keeper, "/opt/neoforge/backups/neoforge_full_*.backup.age")


def test_the_schema_has_the_tables_and_no_rows(fleet: Fleet, keeper: str, secrets: dict[str, str]) -> None:
    schema = read(fleet, keeper, secrets, "/opt/neoforge/backups/neoforge_schema_*.sql.age").decode()
    assert "CREATE TABLE public.email_messages" in schema
    assert not re.search(r"^(COPY|INSERT) ", schema, re.MULTILINE)


def test_a_snapshot_of_redis_is_whole(fleet: Fleet, keeper: str, secrets: dict[str, str]) -> None:
    snapshot = base64.b64encode(read(fleet, keeper, secrets, "/opt/backups/neoforge/redis_*.rdb.age")).decode()
    check = "base64 -d >/run/fleet-test.rdb; redis-check-rdb /run/fleet-test.rdb; code=$?; rm /run/fleet-test.rdb; exit $code"
    assert "RDB looks OK" in fleet.ok(fleet.groups["redis"][0], check, snapshot)


def unpack(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def test_the_configuration_of_each_machine_is_there_without_keys(
    fleet: Fleet, keeper: str, secrets: dict[str, str], each_machine: str
) -> None:
    files = unpack(read(fleet, keeper, secrets, f"/opt/backups/neoforge/{each_machine}/config_*.tar.gz.age"))
    assert {"etc/neoforge/pki/ca.crt", "etc/hosts", "etc/neoforge/firewall/rules.v4"} <= set(files)
    assert [name for name, content in files.items() if b"PRIVATE KEY" in content] == []
    secret = secrets["cipher"].encode()
    assert [name for name, content in files.items() if secret in content or name.endswith((".key", ".acl"))] == []
    assert [name for name in files if "credentials" in name] == []


def test_the_logs_of_the_application_are_there(
    fleet: Fleet, keeper: str, makers: dict[str, list[str]], secrets: dict[str, str]
) -> None:
    for machine in makers["logs"]:
        files = unpack(read(fleet, keeper, secrets, f"/opt/backups/neoforge/{machine}/logs_*.tar.gz.age"))
        assert b"_SYSTEMD_UNIT=neoforge-" in files["journal.export"]


def test_no_backup_holds_the_key_of_the_authority(fleet: Fleet, keeper: str, secrets: dict[str, str]) -> None:
    """Nor could it: the key is nowhere in the fleet. Looked for in every newest backup, unpacked."""
    line = secrets["ca"].splitlines()[2]
    find = "find /opt/backups/neoforge /opt/neoforge/backups -type f -name '*.age'"
    files = fleet.ok(keeper, find).split()
    assert len(files) >= len(KINDS) - 3
    for file in files:
        unpacked = {"z": "gunzip", "p": "pg_restore --file=-", "": "cat"}
        how = unpacked["z" if ".tar.gz" in file else "p" if ".backup" in file else ""]
        found = fleet.shell(
            keeper, f"age --decrypt --identity=- {file} | {how} | grep -cF {line}", secrets["identity"], seconds=120
        )
        assert (found.stdout.strip(), found.returncode) == ("0", 1), file


def test_what_the_operator_keeps_is_not_in_the_fleet(
    fleet: Fleet, keeper: str, secrets: dict[str, str], each_machine: str
) -> None:
    """But for the cipher key, without which pgBackRest could not write into its repository: there, and nowhere else."""
    password = subprocess.run([ROOT / "inventories/vault-password"], capture_output=True, text=True, check=True).stdout
    known = [password.strip(), secrets["cipher"], secrets["identity"], secrets["ca"].splitlines()[2]]
    found = fleet.shell(each_machine, f"grep -rlIF -f - {PLACES} 2>/dev/null", "\n".join(known) + "\n", seconds=180)
    allowed = ["/etc/pgbackrest/conf.d/secrets.conf"] if each_machine == keeper else []
    assert found.stdout.split() == allowed
    if allowed:
        assert fleet.ok(keeper, f"stat -c '%U %G %a' {allowed[0]}").strip() == "root postgres 640"
        with pytest.raises(AssertionError, match="rmission denied"):
            fleet.ok(keeper, f"runuser -u nobody -- cat {allowed[0]}")


@contextmanager
def broken(fleet: Fleet, machine: str, kind: str, harm: str, heal: str) -> Iterator[None]:
    """Something is broken meanwhile; at the end it is mended and the backup is made again."""
    fleet.ok(machine, harm)
    try:
        yield
    finally:
        fleet.ok(machine, heal)
        done = make(fleet, machine, kind)
    assert done.returncode == 0, fleet.ok(machine, f"journalctl -n 20 -o cat -u neoforge-backup@{kind}")


@pytest.mark.parametrize(
    ("kind", "harm", "heal"),
    [
        ("full", "chmod 0 /var/lib/pgbackrest", "chmod 0750 /var/lib/pgbackrest"),
        ("wal", "chmod 0 /var/lib/pgbackrest", "chmod 0750 /var/lib/pgbackrest"),
        ("dump", "chmod 0 /opt/neoforge/backups", "chmod 0750 /opt/neoforge/backups"),
        (
            "configuration",
            "mount -t tmpfs -o size=16k,uid=neoforge-backup tmpfs /opt/backups/neoforge",
            "umount /opt/backups/neoforge",
        ),
        ("redis", "systemctl stop neoforge-backup-store", "systemctl start neoforge-backup-store"),
    ],
)
def test_a_backup_that_fails_says_so_and_takes_none_away(
    fleet: Fleet, keeper: str, kind: str, harm: str, heal: str
) -> None:
    last, _ = metrics(fleet, keeper, kind)
    before = fleet.ok(keeper, "find /opt/backups /opt/neoforge/backups -name '*.age' | sort")
    full = len(info(fleet, keeper)["backup"])
    with broken(fleet, keeper, kind, harm, heal):
        assert make(fleet, keeper, kind).returncode != 0
        assert fleet.ok(keeper, f"systemctl show -P ActiveState neoforge-backup@{kind}").strip() == "failed"
        assert metrics(fleet, keeper, kind) == (last, 1)
        assert f"The backup {kind} failed" in fleet.ok(
            keeper, f"journalctl -o cat -n 5 -u neoforge-backup-report@{kind}-failure"
        )
        fleet.ok(keeper, heal)
        assert fleet.ok(keeper, "find /opt/backups /opt/neoforge/backups -name '*.age' | sort") == before
        assert len(info(fleet, keeper)["backup"]) == full
        fleet.ok(keeper, harm)
    assert metrics(fleet, keeper, kind)[1] == 0


@pytest.fixture
def machine(fleet: Fleet) -> Iterator[str]:
    """A machine that somebody broke into."""
    machine = fleet.groups["api"][0]
    with fleet.free_egress(machine):
        yield machine


TELL = (
    "curl -s -o /dev/null -w '%{{http_code}}' --cacert /etc/neoforge/pki/ca.crt --cert /etc/neoforge/pki/machine.crt "
    "--key /etc/neoforge/pki/machine.key {} https://{}:{}/{}"
)


def test_the_store_gives_nothing_back_and_writes_nothing_again(fleet: Fleet, keeper: str, machine: str) -> None:
    port = fleet.ports["backup"]
    there = newest(fleet, keeper, f"/opt/backups/neoforge/{machine}/config_*").rpartition("/")[2]
    answers = {
        "read": fleet.ok(machine, TELL.format("", keeper, port, there)),
        "delete": fleet.ok(machine, TELL.format("--request DELETE", keeper, port, there)),
        "again": fleet.ok(machine, f"{TELL.format('--upload-file -', keeper, port, there)} </etc/hostname"),
        "elsewhere": fleet.ok(
            machine, f"{TELL.format('--path-as-is --upload-file -', keeper, port, '../x')} </etc/hostname"
        ),
        "never brought": fleet.ok(
            machine, TELL.format("--request POST", keeper, port, "config_20000101_000000.tar.gz.age")
        ),
    }
    assert answers == {"read": "501", "delete": "501", "again": "409", "elsewhere": "404", "never brought": "409"}


def test_a_machine_brings_nothing_in_the_name_of_another(fleet: Fleet, keeper: str, machine: str) -> None:
    if machine == keeper:
        pytest.skip("everything is on one machine")
    name = "neoforge_full_20000101_000000.backup.age"
    command = TELL.format("--upload-file -", keeper, fleet.ports["backup"], name)
    assert fleet.ok(machine, f"{command} </etc/hostname") == "403"


def test_without_a_certificate_of_the_fleet_the_store_says_nothing(fleet: Fleet, keeper: str, machine: str) -> None:
    url = f"https://{keeper}:{fleet.ports['backup']}/x"
    done = fleet.shell(machine, f"curl -s --cacert /etc/neoforge/pki/ca.crt {url}")
    assert done.returncode not in {0, 7, 28}, "neither an answer, nor no connection, nor a firewall's silence"
    assert done.stdout == ""


def test_half_a_backup_is_never_kept(fleet: Fleet, keeper: str, machine: str) -> None:
    """A program that dies in the midst ends its output as one does that is ready: only the second word makes a backup."""
    name = "config_20000101_000000.tar.gz.age"
    put = TELL.format("--upload-file -", keeper, fleet.ports["backup"], name)
    assert fleet.ok(machine, f"{put} </etc/hostname") == "201"
    place = f"/opt/backups/neoforge/{machine}"
    assert name not in fleet.ok(keeper, f"ls {place}").split()
    cut = f"(cat /etc/hostname; sleep 5) | timeout -s KILL 2 {put}"
    assert fleet.shell(machine, cut).returncode != 0
    deadline = time.monotonic() + 10
    while fleet.ok(keeper, f"find {place} -name 'config_20000101_*'"):
        assert time.monotonic() < deadline, "what was cut off is still there"
        time.sleep(0.5)


@pytest.mark.parametrize("unit", [*(f"neoforge-backup@{kind}" for kind in KINDS), "neoforge-backup-store"])
def test_the_sandbox_stands(fleet: Fleet, makers: dict[str, list[str]], keeper: str, unit: str) -> None:
    machine = makers[unit.partition("@")[2]][0] if "@" in unit else keeper
    fleet.ok(machine, f"systemd-analyze security --no-pager --threshold=20 {unit}.service >/dev/null")
