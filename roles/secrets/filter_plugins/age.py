"""Keys of age, which encrypts backups: made on the controller, so that what decrypts never was on a machine of the fleet."""

import hashlib

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
GENERATORS = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def age_keys(secret: str) -> dict[str, str]:
    """Return the identity, which decrypts, and the recipient, which encrypts; always the same for the same secret."""
    private = X25519PrivateKey.from_private_bytes(hashlib.sha256(secret.encode()).digest())
    return {
        "identity": bech32("age-secret-key-", private.private_bytes_raw()).upper(),
        "recipient": bech32("age", private.public_key().public_bytes_raw()),
    }


def bech32(prefix: str, data: bytes) -> str:
    """Return `data` in the form of BIP 173."""
    bits = "".join(f"{byte:08b}" for byte in data)
    values = [int(bits[at : at + 5].ljust(5, "0"), 2) for at in range(0, len(bits), 5)]
    expanded = [ord(letter) >> 5 for letter in prefix] + [0] + [ord(letter) & 31 for letter in prefix]
    checksum = _polymod([*expanded, *values, 0, 0, 0, 0, 0, 0]) ^ 1
    values += [checksum >> 5 * (5 - at) & 31 for at in range(6)]
    return prefix + "1" + "".join(ALPHABET[value] for value in values)


def _polymod(values: list[int]) -> int:
    result = 1
    for value in values:
        top = result >> 25
        result = (result & 0x1FFFFFF) << 5 ^ value
        for at, generator in enumerate(GENERATORS):
            result ^= generator if top >> at & 1 else 0
    return result


class FilterModule:
    """Ansible's way to find filters."""

    def filters(self) -> dict[str, object]:
        """Return the filters of this file by name."""
        return {"age_keys": age_keys}
