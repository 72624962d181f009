"""What judges from elsewhere say of the running fleet: each figure is printed, and may only get better.

Their Python programs are in .cache/judges (.ci/judges); Lynis and OpenSCAP are installed on the machine that they judge.
The bounds and the waivers stand in tests/fleet/security.yml; docs/security.md explains both.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT, Fleet, Show

# They take minutes a machine: `make test-judges` asks for them.
judged = pytest.mark.skipif(
    os.environ.get("FLEET_JUDGES") != "yes", reason="`make test-judges` asks the judges from elsewhere"
)
JUDGES = ROOT / ".cache/judges/bin"
FIGURES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("security.yml").read_text())
SANDBOXED = re.compile(r"(neoforge-|postgresql@|redis-server@|nginx|prometheus|alertmanager|grafana|pgbackrest)")


@pytest.fixture(scope="session")
def judges() -> None:
    subprocess.run([ROOT / ".ci/judges"], check=True)


@cache
def release(fleet: Fleet, machine: str) -> str:
    return fleet.ok(machine, ". /etc/os-release && echo $VERSION_ID").strip()


def bound(unit: str) -> float:
    """The highest exposure that a unit may have."""
    exposure: dict[str, float] = FIGURES["exposure"]
    return next((value for name, value in exposure.items() if re.match(name, unit)), 3.0)


def test_no_unit_has_more_rights_than_its_bound(fleet: Fleet, each_machine: str, show: Show) -> None:
    listed = fleet.ok(
        each_machine, "systemctl list-units --type=service --state=active --plain --no-legend"
    ).splitlines()
    units = [line.split()[0] for line in listed if SANDBOXED.match(line)]
    # What only stands for others runs nothing.
    units = [
        unit for unit in units if fleet.ok(each_machine, f"systemctl show -P ExecStart {unit}").find("/bin/true") < 0
    ]
    assert units
    scores = {}
    for unit in units:
        said = fleet.ok(each_machine, f"systemd-analyze security --no-pager {unit}")
        match = re.search(r"Overall exposure level for .*: ([\d.]+) ", said)
        assert match, said
        scores[unit] = float(match[1])
    show(
        f"{each_machine}: exposure "
        + ", ".join(f"{unit.removesuffix('.service')} {score}" for unit, score in scores.items())
    )
    assert {unit: score for unit, score in scores.items() if score > bound(unit)} == {}


@judged
@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize("family", [4, 6])
def test_ssh_audit_s_policy_for_the_release_passes(fleet: Fleet, each_machine: str, family: int, show: Show) -> None:
    name = f"Hardened Debian {release(fleet, each_machine)} (version "
    listed = subprocess.run(
        [JUDGES / "ssh-audit", "--list-policies"], capture_output=True, text=True, check=True
    ).stdout
    policy = max(re.findall(rf'"({re.escape(name)}\d+\))"', listed))
    address = (fleet.addresses if family == 4 else fleet.addresses6)[each_machine]
    port = str(fleet.ports["ssh"])
    command = [JUDGES / "ssh-audit", "--skip-rate-test", "--policy", policy, "--port", port, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    show(f"{each_machine}: ssh-audit, {policy}, IPv{family}: {'passed' if done.returncode == 0 else 'FAILED'}")
    assert done.returncode == 0, done.stdout


@contextmanager
def let_in(fleet: Fleet, machine: str, port: int) -> Iterator[None]:
    """Open a port to this computer for as long as it is judged."""
    rule = f"INPUT -p tcp --dport {port} -m comment --comment judges -j ACCEPT"
    fleet.ok(machine, f"iptables -w -I {rule}")
    try:
        yield
    finally:
        fleet.ok(machine, f"iptables -w -D {rule}")


def sslyze(fleet: Fleet, configuration: str, machine: str, name: str, port: int, *options: str) -> None:
    """Fails with what differs from Mozilla's configuration, the certificate's chain included."""
    ca = ROOT / ".cache/judges/ca.crt"
    ca.write_text(fleet.ca)
    command: list[str | Path] = [
        JUDGES / "sslyze",
        "--mozilla_config",
        configuration,
        "--certinfo_ca_file",
        ca,
        *options,
    ]
    command.append(f"{name}:{port}{{{fleet.addresses[machine]}}}")
    with let_in(fleet, machine, port):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "OK - Compliant" in done.stdout, done.stdout[-3000:]


@judged
@pytest.mark.usefixtures("judges")
def test_the_edge_is_mozilla_s_intermediate_configuration(fleet: Fleet, show: Show) -> None:
    sslyze(fleet, "intermediate", fleet.groups["loadbalancer"][0], fleet.edge_name, fleet.ports["https"])
    show(f"sslyze: {fleet.edge_name}: intermediate")


@judged
@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize(
    ("group", "port", "options"),
    [
        ("api", "api", []),
        ("postgresql", "postgresql", ["--starttls", "postgres"]),
        ("redis", "redis", []),
        ("redis", "redis_cache", []),
    ],
)
def test_inside_it_is_the_modern_configuration(
    fleet: Fleet, group: str, port: str, options: list[str], show: Show
) -> None:
    machine = fleet.groups[group][0]
    sslyze(fleet, "modern", machine, machine, fleet.ports[port], *options)
    show(f"sslyze: {port} on {machine}: modern")


@judged
def test_lynis_finds_nothing_that_is_not_waived(fleet: Fleet, each_machine: str, show: Show) -> None:
    install = "DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends lynis"
    fleet.ok(each_machine, f"command -v lynis >/dev/null || {install} >/dev/null", seconds=180)
    # Of a new machine, the database of its files would come by itself half an hour later.
    fleet.ok(each_machine, "systemctl start neoforge-integrity@begin", seconds=180)
    fleet.ok(each_machine, "lynis audit system --quick --no-colors --quiet", seconds=600)
    report = fleet.ok(each_machine, "cat /var/log/lynis-report.dat").splitlines()
    found = [line.split("=", 1)[1] for line in report if line.startswith(("warning[]=", "suggestion[]="))]
    index = next(int(line.split("=")[1]) for line in report if line.startswith("hardening_index="))
    given = FIGURES["lynis"]
    show(f"{each_machine}: Lynis: index {index}, no test skipped")
    unexpected = [line for line in found if line.split("|")[0] not in given["waived"]]
    assert unexpected == []
    assert index >= given["index"].get(int(release(fleet, each_machine)), 0)


# Debian 12's own ssg-debian knows nothing of Debian 12: the next release's does. apt fetches as _apt, root gets nowhere.
OPENSCAP = """
set -eu
export DEBIAN_FRONTEND=noninteractive
command -v oscap >/dev/null || apt-get install -qq -y --no-install-recommends openscap-scanner >/dev/null
install -d -o _apt /var/tmp/judges /var/tmp/judges/lists/partial
cd /var/tmp/judges
sed s/bookworm/trixie/ /etc/apt/sources.list >list
ask() {
    apt-get -qq -o Dir::Etc::SourceList="$PWD/list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$PWD/lists" \
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}
if [ ! -e usr ]; then
    ask update
    ask download ssg-debian
    dpkg-deb --extract ssg-debian_*.deb .
fi
rm -r lists
basename ssg-debian_*.deb _all.deb
"""


def openscap(fleet: Fleet, machine: str, profile: str) -> dict[str, list[str]]:
    """Rules by their result, without the ids' common beginning."""
    command = f"oscap xccdf eval --progress --profile xccdf_org.ssgproject.content_profile_{profile} "
    command += "/var/tmp/judges/usr/share/xml/scap/ssg/content/ssg-debian12-ds.xml"
    done = fleet.shell(machine, command, seconds=600)
    # 2: a rule failed.
    assert done.returncode in (0, 2), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for rule, result in re.findall(r"content_rule_([\w-]+):(\w+)", done.stdout):
        found.setdefault(result, []).append(rule)
    assert found.get("pass"), done.stdout + done.stderr
    return found


@judged
def test_openscap_finds_nothing_that_is_not_waived(fleet: Fleet, each_machine: str, show: Show) -> None:
    if release(fleet, each_machine) != "12":
        show(
            f"{each_machine}: NOT JUDGED by OpenSCAP: ssg-debian has nothing for Debian {release(fleet, each_machine)}"
        )
        pytest.skip("OpenSCAP's content ends at Debian 12")
    content = fleet.ok(each_machine, OPENSCAP, seconds=300).strip()
    given = FIGURES["openscap"]
    for profile in ("minimal", "intermediary"):
        found = openscap(fleet, each_machine, f"anssi_bp28_{profile}")
        counts = ", ".join(f"{result} {len(rules)}" for result, rules in sorted(found.items()))
        show(f"{each_machine}: OpenSCAP, {content}, ANSSI-BP-028 {profile}: {counts}")
        show("    fail: " + " ".join(sorted(found.get("fail", []))))
        assert not found.get("error"), found["error"]
        if profile == "minimal":
            assert [rule for rule in found.get("fail", []) if rule not in given["waived"]] == []
        assert len(found.get("fail", [])) <= given["failures"][profile]
