"""Requests to strangers' URLs reach the internet and never a machine of ours, whatever the URL or the name server says."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address

import pytest
from aiohttp import web

from neoforge_email.egress import ANSWER_CHARACTERS, Answer, Egress, NotPublic, is_public
from tests.pki import Pki
from tests.receiver import Receiver, receiving

LOOPBACK = ("127.0.0.0/8",)
PUBLIC = "93.184.215.14"


@pytest.fixture
async def server() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def answering(*answers: list[str]) -> Callable[[str, int], Awaitable[list[str]]]:
    """A name server that gives these answers one after the other, and the last one ever after."""
    left = list(answers)

    async def lookup(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return lookup


REFUSED_ADDRESSES = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.9",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "224.0.1.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:93.184.215.14",
    "64:ff9b::7f00:1",
    "64:ff9b::5db8:d70e",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:5db8:d70e::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
async def test_an_address_that_is_not_public_is_refused_alone_and_among_others(address: str) -> None:
    assert not is_public(ip_address(address))
    with pytest.raises(ValueError, match=r"not public|must be a URL"):
        Egress().check(f"https://[{address}]/" if ":" in address else f"https://{address}/")
    for answer in ([address], [PUBLIC, address]):
        with pytest.raises(NotPublic):
            await Egress(lookup=answering(answer)).addresses("hooks.example.com", 443)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", PUBLIC, "172.32.0.1", "100.128.0.1", "2606:2800:21f:cb07::1", "2a01:4f8::1"]
)
async def test_an_address_on_the_internet_is_not(address: str) -> None:
    assert await Egress(lookup=answering([address])).addresses("hooks.example.com", 443) == [address]


async def test_a_network_that_the_operator_allows_may_be_reached_and_no_other_form_of_it() -> None:
    allowed = ("10.1.0.0/16", "fd00:1::/32")
    for address in ("10.1.2.3", "fd00:1::2"):
        assert await Egress(allowed=allowed, lookup=answering([address])).addresses("erp.example.com", 443)
    for address in ("10.2.0.1", "::ffff:10.1.2.3", "fd00:2::2"):
        with pytest.raises(NotPublic):
            await Egress(allowed=allowed, lookup=answering([address])).addresses("erp.example.com", 443)


REFUSED_URLS = {
    "http://example.com/": "must begin with https://",
    "ftp://example.com/": "must begin with https://",
    "file:///etc/passwd": "must begin with https://",
    "gopher://example.com:443/": "must begin with https://",
    "javascript:alert(1)": "must begin with https://",
    "//example.com/": "must begin with https://",
    "example.com": "must begin with https://",
    "": "must begin with https://",
    "https:///path": "host",
    "https://": "host",
    "https://user@example.com/": "must not hold a user",
    "https://user:password@example.com/": "must not hold a user",
    "https://example.com@127.0.0.1/": "must not hold a user",
    "https://:@example.com/": "must not hold a user",
    "https://example.com/#fragment": "fragment",
    "https://example.com:22/": "port",
    "https://example.com:25/": "port",
    "https://example.com:0/": "port",
    "https://example.com:99999/": "URL such as",
    "https://example.com\\@127.0.0.1/": "without spaces or backslashes",
    "https://example.com/a b": "without spaces or backslashes",
    "https://example.com/\r\nHost: x": "without spaces or backslashes",
    "https://example.com/\0": "without spaces or backslashes",
    "https://example.com/" + "x" * 2000: "at most 2000 characters",
    "https://127.0.0.1/": "not public",
    "https://127.0.0.1:8443/": "not public",
    "https://10.0.0.1/": "not public",
    "https://169.254.169.254/latest/meta-data/": "not public",
    "https://0.0.0.0/": "not public",
    "https://[::1]/": "not public",
    "https://[::]/": "not public",
    "https://[::ffff:127.0.0.1]/": "not public",
    "https://[::ffff:7f00:1]/": "not public",
    "https://[64:ff9b::7f00:1]/": "not public",
    "https://[2002:7f00:1::]/": "not public",
    "https://[fe80::1]/": "not public",
    "https://[fd00::1]/": "not public",
    "https://2130706433/": "usual spelling",
    "https://0x7f000001/": "usual spelling",
    "https://0x7f.0.0.1/": "usual spelling",
    "https://0177.0.0.1/": "usual spelling",
    "https://017700000001/": "usual spelling",
    "https://127.1/": "usual spelling",
    "https://127.0.1/": "usual spelling",
    "https://0x7f.1/": "usual spelling",
    "https://127.0.0.1./": "usual spelling",
    "https://0/": "usual spelling",
    "https://\uff11\uff12\uff17.0.0.1/": "not public",  # full-width digits
    "https://\u2460\u2461\u2466.0.0.1/": "not public",  # digits in circles
}


@pytest.mark.parametrize(("url", "reason"), REFUSED_URLS.items())
async def test_a_url_that_may_lead_elsewhere_is_refused_when_it_is_given_and_when_it_is_used(
    url: str, reason: str
) -> None:
    async def lookup(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was looked up")

    async with Egress(lookup=lookup) as egress:
        with pytest.raises(ValueError, match=reason):
            egress.check(url)
        answer = await egress.post(url, b"{}", {})
    assert answer.status is None
    assert answer.text.startswith("not sent: the URL ")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com:443/webhooks?token=a%2Fb",
        "https://example.com:8443/",
        "https://hooks.example.com./",
        "https://bücher.example/",
        "https://1.example.com/",
        f"https://{PUBLIC}/",
        "https://[2606:2800:21f:cb07::1]/",
    ],
)
def test_a_url_on_the_internet_is_taken(url: str) -> None:
    assert Egress().check(url).scheme == "https"


@pytest.mark.parametrize("name", ["localhost", "localhost.", "LOCALHOST"])
async def test_the_names_of_this_machine_lead_nowhere(name: str, server: Receiver) -> None:
    async with Egress(allow_http=True) as egress:
        answer = await egress.post(f"http://{name}:{server.port}/", b"{}", {})
    assert answer.status is None
    assert answer.text in {
        "no answer: the name leads to an address that is not public",
        "no answer: its name is not found",  # with a dot at its end not every system knows it
    }
    assert not server.requests


async def test_a_name_that_moves_to_a_private_address_between_two_looks_reaches_nothing(server: Receiver) -> None:
    rebinding = answering([PUBLIC], ["127.0.0.1"])
    async with Egress(allow_http=True, lookup=rebinding) as egress:
        assert await egress.addresses("hooks.example.com", server.port) == [PUBLIC]
        answer = await egress.post(f"http://hooks.example.com:{server.port}/", b"{}", {})
    assert answer.text == "no answer: the name leads to an address that is not public"
    assert not server.requests


async def test_each_connection_goes_to_an_address_of_the_answer_that_was_judged(server: Receiver) -> None:
    asked: list[str] = []

    async def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    async with Egress(allow_http=True, allowed=LOOPBACK, lookup=lookup) as egress:
        answer = await egress.post(f"http://hooks.example.com:{server.port}/path?q=1", b"{}", {})
    assert answer == Answer(200, "taken")
    assert asked == ["hooks.example.com"]
    [request] = server.requests
    assert request.path == "/path?q=1"
    assert request.headers["host"] == f"hooks.example.com:{server.port}"


async def test_the_socket_itself_is_refused_where_everything_before_was_passed_by(server: Receiver) -> None:
    class Blind(Egress):
        async def addresses(self, host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

    async with Blind(allow_http=True) as egress:
        answer = await egress.post(f"http://hooks.example.com:{server.port}/", b"{}", {})
    assert answer == Answer(None, "no answer: the address is not public")
    assert not server.requests


async def test_a_redirect_is_an_answer_and_is_not_followed(server: Receiver) -> None:
    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": f"http://127.0.0.1:{server.port}/secret"})

    server.respond = redirect
    async with Egress(allow_http=True, allowed=LOOPBACK) as egress:
        answer = await egress.post(f"http://127.0.0.1:{server.port}/", b"{}", {})
    assert answer.status == 307
    assert [request.path for request in server.requests] == ["/"]


async def test_no_proxy_of_the_environment_and_no_cookie_is_used(
    server: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def with_cookie(request: web.Request) -> web.Response:
        return web.Response(headers={"Set-Cookie": "session=1"})

    server.respond = with_cookie
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with Egress(allow_http=True, allowed=LOOPBACK) as egress:
        for _ in range(2):
            assert (await egress.post(f"http://127.0.0.1:{server.port}/", b"{}", {"X-Ours": "1"})).status == 200
    assert all("cookie" not in it.headers and it.headers["x-ours"] == "1" for it in server.requests)


async def test_an_answers_body_is_read_to_a_few_kilobytes_and_kept_as_one_line(server: Receiver) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        await response.write(b"no\r\n\tgood \0\x1b[31m\xff" + b"x" * 1000)
        while True:
            await response.write(b"y" * 65536)

    server.respond = endless
    async with Egress(allow_http=True, allowed=LOOPBACK) as egress:
        answer = await egress.post(f"http://127.0.0.1:{server.port}/", b"{}", {})
    assert answer.status == 500
    assert answer.text.startswith("no good [31m\N{REPLACEMENT CHARACTER}xxx")
    assert len(answer.text) == ANSWER_CHARACTERS
    assert answer.text.isprintable()


async def test_a_status_counts_although_its_body_never_ends(server: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neoforge_email.egress.ANSWER_PATIENCE", dt.timedelta(seconds=0.1))

    async def dripping(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b".")
            await asyncio.sleep(0.01)

    server.respond = dripping
    async with Egress(allow_http=True, allowed=LOOPBACK, timeout=dt.timedelta(seconds=1)) as egress:
        assert (await egress.post(f"http://127.0.0.1:{server.port}/", b"{}", {})).status == 200


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        ("0", None),
        ("-5", None),
        ("soon", None),
        ("9" * 30, None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
    ],
)
async def test_retry_after_is_understood_in_seconds(value: str, seconds: int | None, server: Receiver) -> None:
    async def throttled(request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": value})

    server.respond = throttled
    async with Egress(allow_http=True, allowed=LOOPBACK) as egress:
        answer = await egress.post(f"http://127.0.0.1:{server.port}/", b"{}", {})
    assert answer.retry_after == (dt.timedelta(seconds=seconds) if seconds else None)


async def test_retry_after_is_understood_as_a_date(server: Receiver) -> None:
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=300)

    async def throttled(request: web.Request) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": at.strftime("%a, %d %b %Y %H:%M:%S GMT")})

    server.respond = throttled
    async with Egress(allow_http=True, allowed=LOOPBACK) as egress:
        answer = await egress.post(f"http://127.0.0.1:{server.port}/", b"{}", {})
    assert answer.retry_after is not None
    assert 295 < answer.retry_after.total_seconds() <= 300


async def test_what_gives_no_answer_gives_a_reason(server: Receiver) -> None:
    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(10)
        return web.Response()

    async def gone(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    limit = dt.timedelta(seconds=0.2)
    async with Egress(allow_http=True, allowed=LOOPBACK, timeout=limit) as egress:
        url = f"http://127.0.0.1:{server.port}/"
        server.respond = silent
        assert await egress.post(url, b"{}", {}) == Answer(None, "no answer within 0.2 seconds")
        server.respond = gone
        assert (await egress.post(url, b"{}", {})).text == "no answer: it closed the connection"
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            closed = f"http://127.0.0.1:{unused.getsockname()[1]}/"
            answer = await egress.post(closed, b"{}", {})
        assert answer.status is None
        assert answer.text == "no answer: connection refused"
    async with Egress(allow_http=True, lookup=unknown) as egress:
        assert (await egress.post("http://hooks.example.com/", b"{}", {})).text == "no answer: its name is not found"


async def test_a_slow_name_server_is_bounded_by_the_same_time(server: Receiver) -> None:
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(10)
        return [PUBLIC]

    async with Egress(allow_http=True, lookup=slow, timeout=dt.timedelta(seconds=0.1)) as egress:
        answer = await egress.post("http://hooks.example.com/", b"{}", {})
    assert answer == Answer(None, "no answer within 0.1 seconds")


async def test_tls_verifies_the_hosts_name_and_not_its_address(pki: Pki) -> None:
    named: list[str | None] = []
    pki.for_another.sni_callback = lambda _socket, name, _context: named.append(name)
    trusting = ssl.create_default_context(cafile=str(pki.ca_file))
    async with (
        receiving(pki.for_another) as server,
        Egress(allowed=LOOPBACK, lookup=answering(["127.0.0.1"]), tls=trusting) as egress,
    ):
        assert (await egress.post(f"https://mail.example.com:{server.port}/", b"{}", {})).status == 200
        other = await egress.post(f"https://other.example.com:{server.port}/", b"{}", {})
    assert other.status is None
    assert "certificate is not accepted" in other.text
    assert named == ["mail.example.com", "other.example.com"]


async def test_a_certificate_of_nobody_we_trust_is_refused(pki: Pki) -> None:
    async with (
        receiving(pki.for_another) as server,
        Egress(allowed=LOOPBACK, lookup=answering(["127.0.0.1"])) as egress,
    ):
        answer = await egress.post(f"https://mail.example.com:{server.port}/", b"{}", {})
    assert answer.status is None
    assert "certificate is not accepted" in answer.text
    assert not server.requests
