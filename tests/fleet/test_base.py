"""Every machine: kernel settings, journal, names, upgrades, as the running system has them."""

from __future__ import annotations

import re

import pytest

from .conftest import Fleet

WITH_KEYS = ["loadbalancer", "api", "postgresql", "redis"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("net.ipv4.conf.all.accept_redirects", "0"),
        ("net.ipv6.conf.all.accept_redirects", "0"),
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.tcp_syncookies", "1"),
        ("net.ipv4.ip_forward", "0"),
    ],
)
def test_the_kernel_has_the_network_settings(fleet: Fleet, setting: str, value: str) -> None:
    assert fleet.ok(fleet.admin, f"sysctl --values {setting}").strip() == value


def test_the_journal_is_kept_over_a_reboot_and_bounded(fleet: Fleet) -> None:
    machine_id = fleet.ok(fleet.admin, "cat /etc/machine-id").strip()
    assert fleet.shell(fleet.admin, f"test -d /var/log/journal/{machine_id}").returncode == 0
    settings = fleet.ok(fleet.admin, "systemd-analyze cat-config systemd/journald.conf")
    assert "SystemMaxUse=1G" in settings


def test_only_security_updates_come_by_themselves_and_never_of_the_databases_or_the_edge(
    fleet: Fleet, each_machine: str
) -> None:
    said = fleet.ok(each_machine, "unattended-upgrade --dry-run --debug 2>&1", seconds=180)
    match = re.search(r"Allowed origins are: (.*)", said)
    assert match, said[-2000:]
    assert match[1].count("origin=") == 1
    assert "label=Debian-Security" in match[1]
    program = (
        "import apt_pkg, re; apt_pkg.init(); never = apt_pkg.config.value_list('Unattended-Upgrade::Package-Blacklist'); "
        "print([name for name in ('postgresql-17', 'postgresql-common', 'redis-server', 'nginx', 'nginx-common', 'openssl') "
        "if any(re.match(one, name) for one in never)])"
    )
    assert fleet.ok(each_machine, f'/usr/bin/python3 -c "{program}"').strip() == (
        "['postgresql-17', 'postgresql-common', 'redis-server', 'nginx', 'nginx-common']"
    )
    assert "apt-daily-upgrade.timer" in fleet.ok(each_machine, "systemctl list-timers --all --no-legend")


def test_nothing_dumps_core(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "runuser -u nobody -- sh -c 'ulimit -H -c'", seconds=30).strip() == "0"


@pytest.mark.parametrize("module", ["usb-storage", "dccp", "cramfs"])
def test_a_module_that_nobody_needs_is_not_loaded(fleet: Fleet, module: str) -> None:
    if fleet.shell(fleet.admin, "command -v modprobe").returncode != 0:
        pytest.skip("a machine without a kernel of its own loads no module")
    assert f"install {module.replace('-', '_')} /bin/false" in fleet.ok(fleet.admin, "modprobe --showconfig").replace(
        module, module.replace("-", "_")
    )


def test_new_files_are_not_everybody_s(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "bash -l -c umask").strip() == "0027"


def test_the_audit_rules_are_written_and_the_daemon_starts_with_the_machine(fleet: Fleet, each_machine: str) -> None:
    assert fleet.ok(each_machine, "systemctl is-enabled auditd").strip() == "enabled"
    assert "/etc/neoforge" in fleet.ok(each_machine, "cat /etc/audit/rules.d/60-neoforge.rules")
    if fleet.shell(each_machine, "systemd-detect-virt --quiet --container").returncode == 0:
        pytest.skip("a container shares its host's audit, and auditd is not started in it")
    assert "/etc/neoforge" in fleet.ok(each_machine, "auditctl -l")


@pytest.mark.parametrize("place", ["/dev", "/dev/shm", "/var/tmp"])
def test_nothing_runs_from_where_everybody_may_write(fleet: Fleet, each_machine: str, place: str) -> None:
    done = fleet.shell(each_machine, f"cp /bin/true {place}/program && {place}/program; echo $?; rm {place}/program")
    assert done.stdout.strip() == "126", done.stderr


def test_wrong_passwords_lock_an_account_for_a_while(fleet: Fleet) -> None:
    name, right = "locked-out", "Right-Password-2026"
    become = f"runuser -u nobody -- su {name} -c true"
    set_password = fleet.shell(fleet.admin, f"useradd --no-create-home {name} && chpasswd", f"{name}:{right}\n")
    assert (set_password.returncode, "BAD PASSWORD" in set_password.stderr) == (0, False), set_password.stderr
    try:
        fleet.ok(fleet.admin, become, right + "\n")
        for _ in range(3):
            assert fleet.shell(fleet.admin, become, "wrong\n").returncode != 0
        assert fleet.shell(fleet.admin, become, right + "\n").returncode != 0
        fleet.ok(fleet.admin, f"faillock --user {name} --reset")
        fleet.ok(fleet.admin, become, right + "\n")
    finally:
        fleet.ok(fleet.admin, f"faillock --user {name} --reset; userdel {name}")


def test_a_changed_file_fails_the_nightly_look_until_it_is_accepted(fleet: Fleet) -> None:
    def look(command: str) -> int:
        return fleet.shell(fleet.admin, f"systemctl start neoforge-integrity@{command}", seconds=300).returncode

    def said(text: str) -> bool:
        journal = "journalctl --quiet --boot --unit=neoforge-integrity@check --since=-5min"
        return text in fleet.ok(fleet.admin, journal)

    assert look("begin") == 0
    assert look("accept") == 0
    assert look("check") == 0
    stranger, program = "/etc/profile.d/stranger.sh", "/usr/share/perl5/Debconf/Log.pm"
    try:
        fleet.ok(fleet.admin, f"echo '# nobody knows' >{stranger}; cp -a {program} /root/; echo '# more' >>{program}")
        assert look("check") != 0
        assert said(stranger)
        assert said(program)
        assert "neoforge-integrity@check" in fleet.ok(fleet.admin, "systemctl --failed --no-legend --plain")
    finally:
        fleet.ok(
            fleet.admin, f"cp -a /root/{program.rsplit('/', 1)[1]} {program}; rm /root/{program.rsplit('/', 1)[1]}"
        )
    assert look("accept") == 0
    assert fleet.ok(fleet.admin, "systemctl --failed --no-legend --plain") == ""
    assert look("check") == 0
    fleet.ok(fleet.admin, f"rm {stranger}")
    assert look("accept") == 0


def test_the_files_are_looked_through_by_themselves(fleet: Fleet, each_machine: str) -> None:
    listed = fleet.ok(each_machine, "systemctl list-timers --no-legend 'neoforge-integrity@*'")
    assert "neoforge-integrity@check.timer" in listed
    assert "neoforge-integrity@begin.timer" in fleet.ok(
        each_machine, "systemctl list-units --no-legend --plain '*.timer'"
    )


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
