"""Values out of foreign JSON: whatever they are, what comes out of here can be stored and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

MOST_IN_RESPONSE = 500
MOST_IN_DETAIL = 2000
MOST_IN_LIST = 50

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
UNKNOWN = datetime(9999, 1, 1, tzinfo=UTC)
"""A time that is missing or cannot be read: later than all others, so that the time of arrival, which bounds it, stands."""


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object, read with more patience than its rules ask for: a recipient's user agent may hold anything.

    Raises ValueError for everything else.
    """
    try:
        found = json.loads(body.decode("utf-8", "replace"), strict=False)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("the JSON is not an object")
    return found


def line(value: object, most: int = MOST_IN_RESPONSE) -> str | None:
    """A text on one line, at most `most` characters, without control characters and lone surrogates; None without any."""
    if not isinstance(value, str):
        return None
    text = value[: 4 * most].encode("utf-8", "replace").decode()
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def detail(values: Mapping[str, object]) -> dict[str, Any]:
    """What else is known, without what is empty; texts, lists and numbers are bounded, anything else is left out."""
    tidy = {name: _bounded(value) for name, value in values.items()}
    return {name: value for name, value in tidy.items() if value not in (None, "", [])}


def _bounded(value: object) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else None
    if isinstance(value, list):
        return [text for text in (line(item, MOST_IN_DETAIL) for item in value[:MOST_IN_LIST]) if text]
    return line(value, MOST_IN_DETAIL)


def child(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object under a name; an empty one where there is none."""
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def children(found: Mapping[str, Any], name: str) -> list[Any]:
    """The list under a name; an empty one where there is none."""
    value = found.get(name)
    return value if isinstance(value, list) else []


def address(value: object) -> str | None:
    """An address as the provider writes it, without a name beside it."""
    text = line(value, 320)
    return text.rpartition("<")[2].rstrip(">").strip() or None if text else None


def unix_time(value: object) -> datetime:
    """Seconds since 1970, not before that; UNKNOWN if it cannot be read."""
    try:
        seconds = float(value) if isinstance(value, int | float | str) else float("nan")
        return max(EARLIEST + timedelta(seconds=seconds), EARLIEST)
    except (ValueError, OverflowError):
        return UNKNOWN


def iso_time(value: object) -> datetime:
    """ISO 8601, in UTC where it says no zone, not before 1970; UNKNOWN if it cannot be read."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else UNKNOWN
        return max((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC), EARLIEST)
    except (ValueError, OverflowError):
        return UNKNOWN
