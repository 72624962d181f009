"""Build the release bundle for a machine's Python on the controller, once for each content.

    python bundle.py ROOT PYTHON_VERSION        for example: bundle.py . 3.13.5

prints JSON: {"version", "archive", "built"}. The version is the package's own and a hash of everything that is
installed, so an unchanged tree is an unchanged release. The archive holds a wheel of the package, a wheel of every
locked dependency and `requirements.txt` with their hashes: a machine installs it with no index and no compiler.

Cached under ROOT/.cache: wheels by hash of the lock and Python, archives in ROOT/dist by version.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux1_x86_64")


def main(root: Path, python: str) -> None:
    lock = (root / "requirements/service.txt").read_text(encoding="utf-8")
    requirements = locked(lock, python)
    tag = "cp" + "".join(python.split(".")[:2])
    version = release(root, lock)
    archive = root / "dist" / f"neoforge-{version}-{tag}-{digest(requirements.encode())[:8]}.tar.gz"
    if built := not archive.exists():
        wheels = download(root, requirements, python)
        write(archive, requirements, wheels, wheel(root))
    print(json.dumps({"version": version, "archive": str(archive), "built": built}))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def release(root: Path, lock: str) -> str:
    """The package's version and twelve digits of a hash of what the wheel is made from and of the lock."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    content = hashlib.sha256()
    for path in sorted((root / "service").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            content.update(f"{path.relative_to(root)}\0{digest(path.read_bytes())}\n".encode())
    content.update(digest(json.dumps(project, sort_keys=True).encode()).encode() + digest(lock.encode()).encode())
    return f"{project['version']}-{content.hexdigest()[:12]}"


def locked(lock: str, python: str) -> str:
    """The lock for one Python, without markers: pip evaluates those for its own Python, not for the machine's."""
    environment = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    lines = []
    for entry in re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*$", "", lock)).splitlines():
        if not entry.strip():
            continue
        text, *hashes = re.split(r"\s+--hash=", entry.strip())
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            lines.append(
                " ".join([f"{requirement.name}{requirement.specifier}", *(f"--hash={item}" for item in hashes)])
            )
    return "\n".join(lines) + "\n"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def download(root: Path, requirements: str, python: str) -> Path:
    """The directory of the dependencies' wheels; filled beside its name, so that a broken download is not kept."""
    tag = "cp" + "".join(python.split(".")[:2])
    directory = root / ".cache/wheels" / f"{tag}-{digest(requirements.encode())[:16]}"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        file = Path(scratch) / "requirements.txt"
        file.write_text(requirements, encoding="utf-8")
        wheels = Path(scratch) / "wheels"
        platforms = [part for name in PLATFORMS for part in ("--platform", name)]
        abis = [part for name in (tag, "abi3", "none") for part in ("--abi", name)]
        python = ".".join(python.split(".")[:2])
        target = ["--python-version", python, "--implementation", "cp", *abis, *platforms]
        pip("download", "--no-deps", "--require-hashes", "--only-binary=:all:", *target, "--dest", wheels, "-r", file)
        wheels.chmod(0o755)
        wheels.replace(directory)
    return directory


def wheel(root: Path) -> tuple[str, bytes]:
    """The package's own wheel: built from a copy, by the pinned backend, the same bytes each time."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(root / "service", source / "service", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(root / name, source / name)
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch, source)
        (file,) = Path(scratch).glob("*.whl")
        return file.name, file.read_bytes()


def write(archive: Path, requirements: str, wheels: Path, own: tuple[str, bytes]) -> None:
    """A tar whose bytes depend on its content alone, moved to its name when it is whole."""
    name, data = own
    package = "==".join(name.split("-")[:2])
    text = f"{requirements}{package} --hash=sha256:{digest(data)}\n"
    members = {f"wheels/{path.name}": path.read_bytes() for path in wheels.iterdir()}
    members |= {f"wheels/{name}": data, "requirements.txt": text.encode()}
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(f".{os.getpid()}")
    with (
        part.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0, filename="") as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in sorted(members):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(members[path]), 0o644
            tar.addfile(entry, io.BytesIO(members[path]))
    part.replace(archive)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
