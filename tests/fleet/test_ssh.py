"""ssh as it runs, and what happens to a configuration that would lock the operator out."""

from __future__ import annotations

import subprocess

import pytest

from .conftest import Fleet, Show
from .lockout import playbook, taken_back


@pytest.mark.parametrize(
    "line",
    [
        "passwordauthentication no",
        "kbdinteractiveauthentication no",
        "authenticationmethods publickey",
        "permitrootlogin without-password",
        "permitemptypasswords no",
        "x11forwarding no",
        "allowagentforwarding no",
        "maxauthtries 3",
        "maxsessions 2",
    ],
)
def test_sshd_runs_hardened(fleet: Fleet, each_machine: str, line: str) -> None:
    assert line in fleet.ok(each_machine, "sshd -T").splitlines()


def test_a_password_is_not_even_asked_for(fleet: Fleet) -> None:
    # The first value of an option wins: these come before the ones that share a connection.
    command = ["ssh", "-o", "ControlPath=none", "-o", "PubkeyAuthentication=no", "-o", "BatchMode=yes"]
    done = subprocess.run(
        [*command, *fleet.ssh_options, fleet.admin, "true"], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


def test_a_user_that_is_not_listed_does_not_get_in(fleet: Fleet) -> None:
    """Not even with the operator's own key."""
    home = "/run/stranger"
    fleet.ok(
        fleet.admin,
        f"useradd --home-dir {home} --create-home --shell /bin/sh stranger && usermod --password '*' stranger",
    )
    try:
        fleet.ok(
            fleet.admin, f"mkdir {home}/.ssh && cp /root/.ssh/authorized_keys {home}/.ssh/ && chown -R stranger: {home}"
        )
        command = ["ssh", "-o", "ControlPath=none", "-o", "BatchMode=yes", "-o", "User=stranger"]
        done = subprocess.run(
            [*command, *fleet.ssh_options, fleet.admin, "true"], capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 255
        assert "Permission denied (publickey)" in done.stderr
    finally:
        fleet.ok(fleet.admin, "userdel --remove stranger")


def test_an_operators_browser_reaches_the_monitoring_through_ssh_and_nothing_else(
    fleet: Fleet, each_machine: str
) -> None:
    watching = each_machine in fleet.groups["monitoring"]
    names = ["prometheus", "alertmanager", "node_exporter"]
    answers = {name: forwarded(fleet, each_machine, fleet.ports[name]) for name in names}
    assert answers == {"prometheus": watching, "alertmanager": watching, "node_exporter": False}


def forwarded(fleet: Fleet, machine: str, port: int) -> bool:
    """Whether a page on the machine's loopback is to be had through ssh."""
    done = subprocess.run(
        ["ssh", "-o", "ControlPath=none", *fleet.ssh_options, "-W", f"127.0.0.1:{port}", machine],
        input="GET / HTTP/1.0\r\n\r\n",
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.stdout.startswith("HTTP/1.0 ")


def test_what_is_written_is_what_sshd_runs_with(fleet: Fleet, each_machine: str) -> None:
    fleet.ok(each_machine, "neoforge-sshd same")


def test_a_configuration_that_locks_the_operator_out_is_taken_back(fleet: Fleet, show: Show) -> None:
    """By the machine itself, seen by new connections; the session that is there proves nothing."""
    state = "cat /etc/ssh/sshd_config.d/00-neoforge.conf; sshd -T"
    taken_back(fleet, "sshd", {"sshd_settings": {"AuthorizedKeysFile": "none"}}, "has its old one back", state, show)
    fleet.ok(fleet.admin, "neoforge-sshd same")


def test_a_configuration_that_sshd_does_not_understand_is_never_written(fleet: Fleet) -> None:
    before = fleet.ok(fleet.admin, "cat /etc/neoforge/sshd.conf")
    with pytest.raises(AssertionError, match="Bad configuration option"):
        playbook("sshd", fleet.admin, {"sshd_settings": {"PermitEverything": "yes"}})
    assert fleet.ok(fleet.admin, "cat /etc/neoforge/sshd.conf") == before
