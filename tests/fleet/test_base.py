"""Every machine: ssh, kernel settings, journal, names, as the running system has them."""

from __future__ import annotations

import subprocess

import pytest

from .conftest import Fleet

WITH_KEYS = ["loadbalancer", "api", "postgresql", "redis"]


@pytest.mark.parametrize(
    "line",
    [
        "passwordauthentication no",
        "kbdinteractiveauthentication no",
        "authenticationmethods publickey",
        "permitrootlogin without-password",
        "permitemptypasswords no",
        "x11forwarding no",
        "allowtcpforwarding no",
        "maxauthtries 3",
    ],
)
def test_sshd_runs_hardened(fleet: Fleet, line: str) -> None:
    assert line in fleet.ok(fleet.admin, "sshd -T").splitlines()


def test_a_password_is_not_even_asked_for(fleet: Fleet) -> None:
    # The first value of an option wins: these come before the ones that share a connection.
    command = [
        "ssh",
        "-o",
        "ControlPath=none",
        "-o",
        "PubkeyAuthentication=no",
        "-o",
        "BatchMode=yes",
        *fleet.ssh_options,
    ]
    done = subprocess.run([*command, fleet.admin, "true"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("net.ipv4.conf.all.accept_redirects", "0"),
        ("net.ipv6.conf.all.accept_redirects", "0"),
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.tcp_syncookies", "1"),
    ],
)
def test_the_kernel_has_the_network_settings(fleet: Fleet, setting: str, value: str) -> None:
    assert fleet.ok(fleet.admin, f"sysctl --values {setting}").strip() == value


def test_the_journal_is_kept_over_a_reboot_and_bounded(fleet: Fleet) -> None:
    machine_id = fleet.ok(fleet.admin, "cat /etc/machine-id").strip()
    assert fleet.shell(fleet.admin, f"test -d /var/log/journal/{machine_id}").returncode == 0
    settings = fleet.ok(fleet.admin, "systemd-analyze cat-config systemd/journald.conf")
    assert "SystemMaxUse=1G" in settings


def test_machines_know_each_other_without_dns(fleet: Fleet, each_machine: str) -> None:
    for name in fleet.groups["api"] + fleet.groups["postgresql"] + fleet.groups["redis"]:
        assert fleet.addresses[name] in fleet.ok(each_machine, f"getent ahostsv4 {name}")


def test_no_unit_failed(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "systemctl --failed --no-legend --plain") == ""


def test_the_time_service_is_enabled(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "systemctl is-enabled chrony").strip() == "enabled"


def test_no_key_is_readable_by_everybody(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "find /etc/neoforge -name '*.key' -perm /o=rwx") == ""
    assert fleet.ok(each_machine, "find /etc/neoforge/credentials -type f -perm /go=rwx 2>/dev/null || true") == ""


def test_the_authority_s_key_is_on_no_machine(fleet: Fleet, each_machine: str) -> None:
    keys = fleet.ok(each_machine, "find /etc/neoforge -name '*.key'").split()
    authority = fleet.ok(each_machine, "openssl x509 -in /etc/neoforge/pki/ca.crt -noout -pubkey")
    assert keys or each_machine not in [name for group in WITH_KEYS for name in fleet.groups[group]]
    for key in keys:
        assert fleet.ok(each_machine, f"openssl pkey -in {key} -pubout") != authority


def test_certificates_are_the_fleet_s_and_hold_for_more_than_thirty_days(fleet: Fleet, each_machine: str) -> None:
    for path in fleet.ok(each_machine, "ls /etc/neoforge/pki/*.crt").split():
        fleet.ok(each_machine, f"openssl verify -CAfile /etc/neoforge/pki/ca.crt {path}")
        fleet.ok(each_machine, f"openssl x509 -in {path} -noout -checkend {30 * 86400}")
