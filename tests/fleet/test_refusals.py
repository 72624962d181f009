"""Bad input through the edge: each answer is problem details that say what to change, and nothing is queued."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import EMAILS, Edge, Fleet

GOOD = {"to": "ada@example.com", "subject": "Hello", "text": "It works."}


@pytest.fixture(autouse=True)
def nothing_is_queued(fleet: Fleet) -> Iterator[None]:
    before = len(fleet.arrivals())
    yield
    assert len(fleet.arrivals()) == before


def fields(problem: Any) -> set[str]:
    return {error["field"] for error in problem["errors"]}


def test_malformed_json_is_refused(edge: Edge) -> None:
    answer = edge.post(b'{"to": "ada@example.com", "subject": ')
    assert answer.status == 400
    assert "JSON" in answer.problem["detail"]


def test_an_unknown_field_is_named(edge: Edge) -> None:
    answer = edge.post({**GOOD, "subjekt": "x"})
    assert answer.status == 422
    assert fields(answer.problem) == {"subjekt"}


@pytest.mark.parametrize(
    "address", ["ada", "ada@", "@example.com", "ada@@example.com", "a b@example.com", "ada@exa mple.com"]
)
def test_a_bad_address_is_refused(edge: Edge, address: str) -> None:
    answer = edge.post({**GOOD, "to": address})
    assert answer.status == 422
    assert any(field.startswith("to") for field in fields(answer.problem))


@pytest.mark.parametrize("name", ["subject", "from", "to", "reply_to", "headers"])
def test_a_line_break_that_would_smuggle_a_header_is_refused(edge: Edge, name: str) -> None:
    smuggled = {
        "subject": "Hello\r\nBcc: eve@example.com",
        "from": "Shop\r\nBcc: eve@example.com <shop@example.com>",
        "to": "ada@example.com\r\nBcc: eve@example.com",
        "reply_to": "ada@example.com\nBcc: eve@example.com",
        "headers": {"X-Order": "1\r\nBcc: eve@example.com"},
    }
    answer = edge.post({**GOOD, name: smuggled[name]})
    assert answer.status == 422
    assert any(field.startswith(name) for field in fields(answer.problem))


def test_an_oversized_body_is_refused_by_the_edge(edge: Edge) -> None:
    answer = edge.ask(EMAILS, size_bytes=(10 << 20) + 1, headers=edge.headers)
    assert answer.status == 413
    assert "10485760" in answer.problem["detail"]


def test_a_body_within_the_limit_reaches_the_service(edge: Edge) -> None:
    answer = edge.ask(EMAILS, size_bytes=9 << 20, headers=edge.headers)
    assert answer.status == 400
    assert "JSON" in answer.problem["detail"]


@pytest.mark.parametrize("value", ["Bearer nf_" + "x" * 43, "Bearer nonsense", "Basic YTpi", ""])
def test_a_wrong_key_is_refused(edge: Edge, value: str) -> None:
    answer = edge.post(GOOD, Authorization=value)
    assert answer.status == 401
    assert answer.problem["type"].endswith("unauthorized")
    assert "bearer" in answer.headers["www-authenticate"].lower()


def test_an_idempotency_key_is_not_taken_for_another_body(edge: Edge, fleet: Fleet) -> None:
    key = str(uuid.uuid4())
    first = edge.post({**GOOD, "to": "smtp-550@example.com"}, Idempotency_Key=key)
    assert first.status == 202
    same = edge.post({**GOOD, "to": "smtp-550@example.com"}, Idempotency_Key=key)
    assert same.status == 202
    assert same.headers["idempotent-replayed"] == "true"
    other = edge.post({**GOOD, "to": "smtp-550@example.com", "subject": "Another"}, Idempotency_Key=key)
    assert other.status == 409
    assert other.problem["type"].endswith("idempotency-key-reused")
    fleet.wait_for_empty_queue(30)


def test_another_media_type_is_refused(edge: Edge) -> None:
    answer = edge.ask(EMAILS, b"to=ada", headers={**edge.headers, "Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status == 415
    assert answer.problem["detail"]
