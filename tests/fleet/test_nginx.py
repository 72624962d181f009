"""The edge as a client outside of the fleet meets it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import EMAILS, INVENTORY, ROOT, Edge, Fleet

PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))

HEADERS = {
    "strict-transport-security": "max-age=31536000; includeSubDomains",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-xss-protection": "0",
    "content-security-policy": "default-src 'self'",
    "referrer-policy": "strict-origin-when-cross-origin",
}
HANDSHAKE = """
import socket, ssl, sys, warnings
name, address, version, ca = sys.argv[1:]
warnings.simplefilter("ignore")
context = ssl.create_default_context(cadata=ca)
context.set_ciphers("ALL:@SECLEVEL=0")
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
with socket.create_connection((address, 443), 5) as raw, context.wrap_socket(raw, server_hostname=name) as tls:
    print(tls.version())
"""


# 25 connections, each with a request whose body does not come; how many stay open, and the answers of the others.
CROWD = """
import socket, ssl, sys
name, address, ca = sys.argv[1:]
context = ssl.create_default_context(cadata=ca)
held = []
for _ in range(25):
    tls = context.wrap_socket(socket.create_connection((address, 443), 10), server_hostname=name)
    tls.sendall(f"POST /api/v1/emails HTTP/1.1\\r\\nHost: {name}\\r\\nContent-Length: 99\\r\\n\\r\\n".encode())
    held.append(tls)
waiting, answers = 0, []
for tls in held:
    tls.settimeout(0.1)
    try:
        answers.append(tls.recv(4096).split()[1].decode())
    except TimeoutError:
        waiting += 1
print(waiting, *answers)
"""


def handshake(fleet: Fleet, name: str, version: str) -> tuple[int, str]:
    address = fleet.addresses[fleet.groups["loadbalancer"][0]]
    done = fleet.shell(fleet.outsider, f"python3 - {name} {address} {version} '{fleet.ca}'", HANDSHAKE)
    return done.returncode, done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("version", "spoken"), [("TLSv1_3", "TLSv1.3"), ("TLSv1_2", "TLSv1.2")])
def test_current_tls_is_spoken(fleet: Fleet, version: str, spoken: str) -> None:
    assert handshake(fleet, fleet.edge_name, version) == (0, spoken)


@pytest.mark.parametrize("version", ["TLSv1_1", "TLSv1"])
def test_old_tls_is_refused(fleet: Fleet, version: str) -> None:
    assert handshake(fleet, fleet.edge_name, version)[0] != 0


def test_a_name_that_is_not_ours_gets_no_certificate(fleet: Fleet) -> None:
    code, why = handshake(fleet, "other.example.com", "TLSv1_3")
    assert code != 0
    assert "UNRECOGNIZED_NAME" in why


def test_plain_http_is_redirected(edge: Edge) -> None:
    answer = edge.ask("/docs?x=1", plain=True)
    assert answer.status == 301
    assert answer.headers["location"] == f"https://{edge.fleet.edge_name}/docs?x=1"


@pytest.mark.parametrize("path", ["/health", "/metrics", EMAILS, "/nothing"])
def test_every_answer_carries_the_security_headers(edge: Edge, path: str) -> None:
    answer = edge.ask(path)
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert answer.headers["server"] == "nginx"


def test_the_documentation_keeps_its_own_policy_and_works(edge: Edge) -> None:
    page = edge.ask("/docs")
    assert page.status == 200
    assert "'unsafe-inline'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert edge.ask("/docs/swagger-ui-bundle.js").status == 200
    assert edge.ask("/schema/openapi.json").status == 200


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "//metrics", "/METRICS"])
def test_metrics_are_not_shown_to_the_world(edge: Edge, path: str) -> None:
    answer = edge.ask(path)
    assert answer.status == 404
    assert "python_info" not in answer.text


def test_the_edge_itself_answers_with_problem_details(edge: Edge) -> None:
    too_big = edge.ask(EMAILS, size_bytes=(10 << 20) + 1, headers=edge.headers)
    assert too_big.status == 413
    assert too_big.problem["type"].endswith("body-too-large")
    assert {name: too_big.headers.get(name) for name in HEADERS} == HEADERS


def test_an_api_that_is_away_is_a_bad_gateway_that_says_to_repeat(fleet: Fleet, edge: Edge) -> None:
    machines = fleet.groups["api"]
    try:
        for machine in machines:
            fleet.ok(machine, "systemctl stop neoforge-api")
        answer = edge.post({"to": "ada@example.com", "subject": "Away", "text": "x"})
    finally:
        for machine in machines:
            fleet.ok(machine, "systemctl start neoforge-api")
    assert answer.status == 502
    assert "Idempotency-Key" in answer.problem["detail"]
    assert answer.headers["retry-after"] == "1"
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if edge.ask("/health/ready").status == 200:
            return
        time.sleep(0.5)
    pytest.fail("the API did not come back")


def upstreams(fleet: Fleet, requests: int) -> set[str]:
    """The API's machines that the edge's last requests were passed on to."""
    lines = fleet.ok(fleet.groups["loadbalancer"][0], f"tail -n {requests} /var/log/nginx/access.log").splitlines()
    return {json.loads(line)["upstream"].split(":")[0] for line in lines}


def test_while_one_machine_of_the_api_is_away_the_others_answer_everything(fleet: Fleet, edge: Edge) -> None:
    first, *others = fleet.groups["api"]
    if not others:
        pytest.skip("this inventory has one machine of the API")
    try:
        fleet.ok(first, "systemctl stop neoforge-api")
        assert {edge.ask("/health").status for _ in range(6)} == {200}
    finally:
        fleet.ok(first, "systemctl start neoforge-api")


def test_a_drained_machine_gets_no_request_until_it_is_back(fleet: Fleet, edge: Edge) -> None:
    first, *others = fleet.groups["api"]
    command = [PLAYBOOK, "site.yml", "-i", INVENTORY, "--tags", "nginx", "--limit", "loadbalancer"]
    drain = ["--extra-vars", json.dumps({"drained": [first]})]
    done = subprocess.run([*command, *drain], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if not others:
        assert done.returncode == 2
        assert "leave one out of drained" in done.stdout
        return
    assert done.returncode == 0, done.stdout[-3000:]
    assert {edge.ask("/health").status for _ in range(6)} == {200}
    assert upstreams(fleet, 6) == {fleet.addresses[machine] for machine in others}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {edge.ask("/health").status for _ in range(8)} == {200}
    assert upstreams(fleet, 8) == {fleet.addresses[machine] for machine in fleet.groups["api"]}


def test_an_address_that_holds_too_many_connections_is_told_to_wait(fleet: Fleet) -> None:
    address = fleet.addresses[fleet.groups["loadbalancer"][0]]
    answers = fleet.ok(fleet.outsider, f"python3 - {fleet.edge_name} {address} '{fleet.ca}'", CROWD, seconds=120)
    # Those that wait for their body hold a connection each; what is above the limit is answered at once.
    assert answers.split() == ["20", "429", "429", "429", "429", "429"]


def test_http_2_is_spoken(fleet: Fleet) -> None:
    address = fleet.addresses[fleet.groups["loadbalancer"][0]]
    program = HANDSHAKE.replace("print(tls.version())", "print(tls.selected_alpn_protocol())")
    program = program.replace(
        "context.set_ciphers", 'context.set_alpn_protocols(["h2", "http/1.1"]); context.set_ciphers'
    )
    command = f"python3 - {fleet.edge_name} {address} TLSv1_3 '{fleet.ca}'"
    assert fleet.ok(fleet.outsider, command, program).strip() == "h2"


def test_the_log_knows_the_real_client_and_no_secret(fleet: Fleet, edge: Edge) -> None:
    edge.ask("/health", headers={"X-Forwarded-For": "192.0.2.1"})
    line = json.loads(fleet.ok(fleet.groups["loadbalancer"][0], "tail -n 1 /var/log/nginx/access.log"))
    assert line["client"] == fleet.addresses[fleet.outsider]
    assert edge.key not in json.dumps(line)


def test_a_change_of_the_configuration_reloads_and_does_not_restart(fleet: Fleet) -> None:
    machine = fleet.groups["loadbalancer"][0]
    fleet.ok(machine, "nginx -t -q")
    before = fleet.ok(machine, "systemctl show nginx --property=MainPID --property=NRestarts")
    fleet.ok(machine, "systemctl reload nginx")
    assert fleet.ok(machine, "systemctl show nginx --property=MainPID --property=NRestarts") == before


def test_nginx_has_no_more_rights_than_it_needs(fleet: Fleet) -> None:
    shown = fleet.ok(fleet.groups["loadbalancer"][0], "systemctl show nginx --property=NoNewPrivileges,ProtectSystem")
    assert set(shown.split()) == {"NoNewPrivileges=yes", "ProtectSystem=strict"}
