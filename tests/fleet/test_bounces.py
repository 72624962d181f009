"""Bounces by mail, from a machine outside: what comes back to a message's own return path becomes its status."""

from __future__ import annotations

import json
import time

from .conftest import EMAILS, Edge, Fleet

DOMAIN = "bounces.example.com"

# Delivers standard input to a recipient, over TLS that is not verified as among mail servers, and prints the last answer.
DELIVER = r"""
import smtplib, ssl, sys
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
with smtplib.SMTP(sys.argv[1], int(sys.argv[2]), timeout=20) as client:
    client.starttls(context=context)
    client.ehlo()
    print(client.mail("")[0])
    code, _ = client.rcpt(sys.argv[3])
    print(client.data(sys.stdin.buffer.read())[0] if code == 250 else code)
"""

REPORT = """\
From: MAILER-DAEMON@mail.example.org
To: {to}
Subject: Undelivered Mail Returned to Sender
Message-ID: <{to}>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary=report

--report
Content-Type: text/plain

It could not be delivered.
--report
Content-Type: message/delivery-status

Reporting-MTA: dns; mail.example.org

Final-Recipient: rfc822; {recipient}
Action: failed
Status: 5.1.1
Diagnostic-Code: smtp; 550 5.1.1 User unknown
--report--
"""


def deliver(fleet: Fleet, to: str, text: str) -> str:
    """The answer to the end of the mail, or to its recipient."""
    address = fleet.addresses[fleet.admin]
    fleet.ok(fleet.outsider, "cat >/root/deliver.py", DELIVER)
    return fleet.ok(fleet.outsider, f"python3 /root/deliver.py {address} {fleet.ports['smtp']} '{to}'", text).split()[1]


def test_a_bounce_to_the_return_path_of_a_message_becomes_its_status(fleet: Fleet, edge: Edge) -> None:
    recipient = f"bounced-{time.time_ns()}@example.com"
    answer = edge.post({"to": recipient, "subject": "Hello", "text": "It has left."})
    assert answer.status == 202
    email_id = json.loads(answer.text)["id"]
    assert edge.delivered(email_id)["recipients"][0]["status"] == "sent"
    [return_path] = [entry["sender"] for entry in fleet.arrivals() if recipient in entry["recipients"]]
    assert return_path.startswith(f"bounce+{email_id.replace('-', '')}-")
    assert return_path.endswith(f"@{DOMAIN}")

    assert deliver(fleet, return_path, REPORT.format(to=return_path, recipient=recipient)) == "250"
    status, give_up = "", time.monotonic() + 20
    while status != "bounced" and time.monotonic() < give_up:
        email = json.loads(edge.ask(f"{EMAILS}/{email_id}", headers=edge.headers).text)
        status = email["recipients"][0]["status"]
        time.sleep(0.5)
    assert status == "bounced"


def test_nothing_is_relayed(fleet: Fleet) -> None:
    for recipient in ("ada@example.net", f"ada@{DOMAIN}", f"bounce+x@{DOMAIN}"):
        assert deliver(fleet, recipient, "") == "550"


def test_the_port_is_held_by_systemd_while_the_listener_restarts(fleet: Fleet) -> None:
    fleet.ok(fleet.admin, "systemctl restart --no-block neoforge-bounces.service")
    for _ in range(5):
        assert deliver(fleet, f"ada@{DOMAIN}", "") == "550"
    assert fleet.ok(fleet.admin, "systemctl is-active neoforge-bounces.socket").strip() == "active"
