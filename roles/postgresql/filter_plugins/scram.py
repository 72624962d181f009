"""SCRAM-SHA-256 verifiers as PostgreSQL stores them, so that no password is sent to a server in SQL."""

import base64
import hashlib
import hmac
from typing import Any


def scram_verifier(password: str, salt_secret: str, role: str, iterations: int = 4096) -> str:
    """Return the verifier of `password` for `role`, always the same for the same input (RFC 5803, RFC 7677).

    Passwords are ASCII, so that SASLprep leaves them as they are.
    """
    salt = hashlib.sha256(f"{salt_secret}:{role}".encode("ascii")).digest()[:16]
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    encoded = [base64.b64encode(part).decode("ascii") for part in (salt, stored_key, server_key)]
    return f"SCRAM-SHA-256${iterations}:{encoded[0]}${encoded[1]}:{encoded[2]}"


def postgresql_wanted(role: dict[str, Any], passwords: dict[str, str], salt_secret: str) -> dict[str, Any]:
    """Return a role of `postgresql_roles` as cluster.sql wants it: every key there, the verifier in the password's place."""
    name = role["name"]
    return {
        "name": name,
        "login": role.get("login", False),
        "replication": role.get("replication", False),
        "bypassrls": role.get("bypassrls", False),
        "verifier": scram_verifier(passwords[name], salt_secret, name) if name in passwords else None,
        "member_of": role.get("member_of", []),
    }


class FilterModule:
    """Ansible's way to find filters."""

    def filters(self) -> dict[str, object]:
        """Return the filters of this file by name."""
        return {"scram_verifier": scram_verifier, "postgresql_wanted": postgresql_wanted}
