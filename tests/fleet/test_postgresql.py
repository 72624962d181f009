"""PostgreSQL as it runs: checksums, TLS, SCRAM, rights, audit, and its return from a kill."""

from __future__ import annotations

import json
import time

import pytest

from .conftest import Fleet

PSQL = "runuser -u postgres -- psql -XAtq -d neoforge_prod"


@pytest.fixture(scope="module")
def machine(fleet: Fleet) -> str:
    return fleet.groups["postgresql"][0]


def sql(fleet: Fleet, machine: str, statement: str) -> str:
    return fleet.ok(machine, f"{PSQL} -v ON_ERROR_STOP=1", statement).strip()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data_checksums", "on"),
        ("ssl", "on"),
        ("ssl_min_protocol_version", "TLSv1.3"),
        ("password_encryption", "scram-sha-256"),
        ("synchronous_commit", "on"),
        ("fsync", "on"),
        ("jit", "off"),
        ("max_prepared_transactions", "0"),
        ("default_toast_compression", "lz4"),
        ("log_parameter_max_length", "0"),
        ("log_parameter_max_length_on_error", "0"),
        ("pgaudit.log", "ddl, role"),
        ("pgaudit.log_parameter", "off"),
        ("pgaudit.role", "neoforge_auditor"),
    ],
)
def test_it_runs_with_the_setting(fleet: Fleet, machine: str, setting: str, value: str) -> None:
    assert sql(fleet, machine, f"select current_setting('{setting}')") == value


def test_its_settings_come_from_the_file_that_ansible_writes(fleet: Fleet, machine: str) -> None:
    source = sql(fleet, machine, "select sourcefile from pg_settings where name = 'shared_buffers'")
    assert source.endswith("/conf.d/60-neoforge.conf")
    assert sql(fleet, machine, "select count(*) from pg_settings where pending_restart") == "0"
    assert sql(fleet, machine, "select count(*) from pg_file_settings where error is not null") == "0"


def test_the_database_orders_text_alike_on_every_release(fleet: Fleet, machine: str) -> None:
    query = "select datcollate, pg_get_userbyid(datdba) from pg_database where datname = current_database()"
    assert sql(fleet, machine, query) == "C.UTF-8|neoforge_owner"


def test_pg_hba_knows_scram_over_tls_only_and_ends_in_reject(fleet: Fleet, machine: str) -> None:
    rows = sql(fleet, machine, "select type, auth_method from pg_hba_file_rules order by line_number").splitlines()
    assert rows[0] == "local|peer"
    assert set(rows[1:-3]) == {"hostssl|scram-sha-256"}
    assert rows[-3:] == ["local|reject", "host|reject", "host|reject"]
    assert sql(fleet, machine, "select count(*) from pg_hba_file_rules where error is not null") == "0"


def test_every_password_is_a_scram_verifier(fleet: Fleet, machine: str) -> None:
    query = "select rolname from pg_authid where rolname <> 'postgres' and rolcanlogin"
    assert sql(fleet, machine, query).count("neoforge_") == 6
    assert sql(fleet, machine, f"{query} and rolpassword not like 'SCRAM-SHA-256$%'") == ""


def test_no_role_of_the_service_may_more_than_it_needs(fleet: Fleet, machine: str) -> None:
    powers = "rolsuper or rolcreatedb or rolcreaterole or rolreplication or rolbypassrls"
    query = f"select rolname from pg_roles where rolname like 'neoforge%' and ({powers}) order by rolname"
    assert sql(fleet, machine, query) == "neoforge_backup\nneoforge_replication"
    query = (
        "select rolsuper or rolcreatedb or rolcreaterole, rolbypassrls, rolreplication from pg_roles where rolname = "
    )
    assert sql(fleet, machine, f"{query} 'neoforge_replication'") == "f|f|t"
    assert sql(fleet, machine, f"{query} 'neoforge_backup'") == "f|t|f"
    assert sql(fleet, machine, "select has_schema_privilege('neoforge_app', 'public', 'create')") == "f"
    query = "select count(*) from pg_database, aclexplode(datacl) where datname = current_database() and grantee = 0"
    assert sql(fleet, machine, query) == "0"


def refusal(fleet: Fleet, machine: str, **options: str) -> str:
    """What PostgreSQL says to a machine of the API that logs in as it does, but for these options."""
    given = {"host": machine, "port": fleet.ports["postgresql"], "database": "neoforge_prod", "user": "neoforge_api"}
    attempt = """
import asyncio, json, ssl, sys
import asyncpg
given = json.load(sys.stdin)
mode = given.pop("mode")
if mode != "disable":
    context = ssl.create_default_context(cafile="/etc/neoforge/pki/ca.crt")
    context.maximum_version = ssl.TLSVersion[mode]
try:
    asyncio.run(asyncpg.connect(**given, ssl=False if mode == "disable" else context, timeout=10))
    print("let in")
except Exception as error:
    print(type(error).__name__, error)
"""
    fleet.ok(fleet.admin, "cat >/run/attempt.py", attempt)
    with fleet.free_egress(fleet.admin):
        return fleet.ok(
            fleet.admin, "/opt/neoforge/current/bin/python /run/attempt.py", json.dumps({**given, **options})
        )


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("disable", "pg_hba.conf rejects"),
        ("TLSv1_3", "password authentication failed"),
        ("TLSv1_2", "protocol version"),
    ],
)
def test_nobody_gets_in_without_current_tls_or_with_a_wrong_password(
    fleet: Fleet, machine: str, mode: str, why: str
) -> None:
    assert why in refusal(fleet, machine, mode=mode, password="wrong").lower()


def test_writes_of_sensitive_tables_are_audited(fleet: Fleet, machine: str) -> None:
    for table in ("users", "api_keys"):
        assert sql(fleet, machine, f"select has_table_privilege('neoforge_auditor', '{table}', 'insert')") == "t"


def test_the_sandbox_stands(fleet: Fleet, machine: str) -> None:
    unit = fleet.ok(machine, "systemctl list-units --plain --no-legend 'postgresql@*' | cut -d' ' -f1").strip()
    fleet.ok(machine, f"systemd-analyze security --no-pager --threshold=20 {unit} >/dev/null")


def test_it_comes_back_from_a_kill(fleet: Fleet, machine: str) -> None:
    unit = fleet.ok(machine, "systemctl list-units --plain --no-legend 'postgresql@*' | cut -d' ' -f1").strip()
    old = fleet.ok(machine, f"systemctl show --property=MainPID --value {unit}").strip()
    fleet.ok(machine, f"kill -KILL {old}")
    deadline = time.monotonic() + 60
    while fleet.shell(machine, f"{PSQL} -c 'select 1'").returncode != 0:
        assert time.monotonic() < deadline, fleet.ok(machine, f"journalctl -n 30 -u {unit}")
        time.sleep(0.5)
    assert fleet.ok(machine, f"systemctl show --property=MainPID --value {unit}").strip() != old
