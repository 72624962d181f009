"""The secrets of the inventory under test, as the controller has them."""

from __future__ import annotations

import base64
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

from .conftest import ROOT


@dataclass(frozen=True)
class Vault:
    """The encrypted file that `site.yml` made."""

    file: Path

    @property
    def runs(self) -> Path:
        """Where interrupted.py keeps what Ansible said."""
        return self.file.parent / "runs"

    def read(self) -> dict[str, str]:
        done = subprocess.run(
            ["ansible-vault", "view", str(self.file)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found = yaml.safe_load(done.stdout)
        assert isinstance(found, dict)
        return found

    def passwords(self) -> list[str]:
        """Names of what is text for a machine and may be another text after the next run."""
        return sorted(name for name in self.read() if name.startswith(("postgresql_", "redis_")))

    def forget(self, name: str) -> None:
        """Take a secret out of the file; the next run makes another one."""
        left = {key: value for key, value in self.read().items() if key != name}
        subprocess.run(
            ["ansible-vault", "encrypt", f"--output={self.file}", "-"],
            cwd=ROOT,
            input=yaml.safe_dump(left),
            capture_output=True,
            text=True,
            check=True,
        )

    def needles(self) -> dict[str, list[str]]:
        """What would give each secret away: itself and its base64 forms; of a key in lines, each line of its middle.

        Every secret is random and long, so that finding one anywhere is no accident.
        """
        found: dict[str, list[str]] = {}
        for name, value in self.read().items():
            if name in {"ca_certificate", "backup_recipient"}:  # public
                continue
            lines = [line for line in value.splitlines() if len(line) > 20 and "-----" not in line]
            assert lines, f"{name} is too short to be looked for"
            # Whatever stands before it: three shifts, without the ends that depend on it.
            encoded = [base64.b64encode(b"x" * shift + lines[0].encode()).decode()[4:-4] for shift in range(3)]
            found[name] = [*lines, *encoded]
        return found
