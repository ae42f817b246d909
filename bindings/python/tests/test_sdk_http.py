"""http_get and http_post: heads, bodies whole and in parts, uploads, and when streams close."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator

import pytest
from inferlet import (
    ArgumentError,
    ClosedError,
    DeniedError,
    QuotaError,
    Response,
    UnavailableError,
    abi,
    gather,
    http_get,
    http_post,
)
from scripted import Host
from scripted_services import Site

URL = "https://example.org/"


@pytest.fixture
def web(attached: Host) -> dict[str, Site]:
    sites = attached.controller.services.web
    sites[URL] = Site(200, {"Content-Type": "text/plain"}, [b"ab", b"c", b"def"])
    sites[URL + "none"] = Site(204)
    return sites


def open_streams(host: Host) -> int:
    gc.collect()
    host.settle()
    return len(host.controller.services.streams)


def test_a_response(attached: Host, web: dict[str, Site]) -> None:
    response = http_get(URL, headers={"accept": "text/plain"})
    assert response.status == 200 and response.headers == {"content-type": "text/plain"}
    assert response.read().result() == b"abcdef"
    assert response.read().result() == b"abcdef"  # kept
    assert response.text().result() == "abcdef"
    assert attached.controller.services.requests == [
        ("GET", URL, {"accept": "text/plain"}, bytearray())
    ]
    assert open_streams(attached) == 0  # closed at the end of the body, still referred to
    empty = http_get(URL + "none")
    assert (empty.status, empty.read().result(), list(empty)) == (204, b"", [])


def test_a_body_in_parts(attached: Host, web: dict[str, Site]) -> None:
    assert list(http_get(URL)) == [b"ab", b"c", b"def"]
    response = http_get(URL)
    assert next(response) == b"ab"
    assert response.read().result() == b"cdef"  # the rest
    assert list(response) == []


def test_under_asyncio(attached: Host, web: dict[str, Site]) -> None:
    async def program() -> None:
        response = await http_get(URL)
        assert response.status == 200
        assert [part async for part in response] == [b"ab", b"c", b"def"]
        both = list(await asyncio.gather(http_get(URL).read(), http_get(URL).text()))
        assert both == [b"abcdef", "abcdef"]

    asyncio.run(program())


def test_several_at_once_take_one_round_trip(attached: Host, web: dict[str, Site]) -> None:
    responses = [http_get(URL) for _ in range(3)]
    heads = gather(*(response.head for response in responses)).result()
    assert [head.status for head in heads] == [200] * 3
    assert len(attached.controller.frames) == 1


def test_text_and_json(web: dict[str, Site]) -> None:
    web["latin"] = Site(headers={"content-type": 'text/html; Charset="latin-1"'}, parts=[b"\xe9"])
    web["odd"] = Site(headers={"content-type": "text/html; charset=none-such"}, parts=[b"\xc3\xa9"])
    web["split"] = Site(parts=[b"\xc3", b"\xa9\xff"])
    web["json"] = Site(parts=[b'{"a": [1, "\xc3', b'\xa9"]}'])
    assert [http_get(u).text().result() for u in ("latin", "odd")] == ["\u00e9"] * 2
    assert http_get("split").text().result() == "\u00e9\ufffd"
    assert http_get("json").json().result() == {"a": [1, "\u00e9"]}
    with pytest.raises(ArgumentError, match="no JSON"):
        http_get(URL).json().result()


def test_what_a_request_fails_with(attached: Host, web: dict[str, Site]) -> None:
    web["down"] = Site(error=UnavailableError("no route", "try later"))
    for url, error in (("https://elsewhere.org", DeniedError), ("down", UnavailableError)):
        uses: list[Callable[[Response], object]] = [
            lambda r: r.status,
            lambda r: r.headers,
            lambda r: r.read().result(),
            lambda r: r.text().result(),
            next,
        ]
        for use in uses:
            with pytest.raises(error):
                use(http_get(url))
    assert open_streams(attached) == 0


def test_streams_are_closed(attached: Host, web: dict[str, Site]) -> None:
    with http_get(URL) as response:
        assert next(response) == b"ab"
        assert open_streams(attached) == 1
    assert open_streams(attached) == 0
    with pytest.raises(ClosedError, match="was closed"):
        response.read().result()
    assert list(response) == []
    held = [http_get(URL) for _ in range(3)]
    with pytest.raises(QuotaError):
        http_get(URL).status  # noqa: B018
    held.pop()
    assert open_streams(attached) == 2
    held[0].close()
    held[0].close()
    assert held[0].status == 200 and open_streams(attached) == 1


def test_a_response_is_alive_while_somebody_waits_for_it(web: dict[str, Site]) -> None:
    head, body = http_get(URL).head, http_get(URL).read()
    gc.collect()
    assert (head.result().status, body.result()) == (200, b"abcdef")


def test_a_part_that_is_given_up_is_not_lost(attached: Host, web: dict[str, Site]) -> None:
    async def program() -> bytes:
        response = await http_get(URL)
        part = asyncio.ensure_future(anext(response))
        await asyncio.sleep(0)  # it waits
        part.cancel()
        with pytest.raises(asyncio.CancelledError):
            await part
        return await response.read()

    assert asyncio.run(program()) == b"abcdef"


# --- bodies sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"", b"{}", "h\u00e9", b"x" * 59000, b"x" * 60000, b"y" * 500_000, bytearray(b"z")]
)
def test_bodies_of_any_length(attached: Host, web: dict[str, Site], body: bytes | str) -> None:
    response = http_post(URL, body, headers={"content-type": "x"})
    assert response.status == 200 and response.read().result() == b"abcdef"
    (request,) = attached.controller.services.requests
    assert request[:3] == ("POST", URL, {"content-type": "x"})
    assert request[3] == (body.encode() if isinstance(body, str) else body)


def test_a_long_url_leaves_room_for_the_body(attached: Host, web: dict[str, Site]) -> None:
    url = "u" * 8192
    web[url] = Site()
    assert http_post(url, b"x" * 59000).status == 200
    assert attached.controller.services.requests[0][3] == b"x" * 59000


def test_a_body_in_parts_is_sent_while_the_program_waits(
    attached: Host, web: dict[str, Site]
) -> None:
    made = 0

    def parts() -> Iterator[bytes]:
        nonlocal made
        for i in range(100):
            made += 1
            yield b"" if i == 50 else b"%d," % i

    response = http_post(URL, parts())
    assert made < 10  # not all at once
    assert response.status == 200 and made == 100
    sent = b"".join(b"%d," % i for i in range(100) if i != 50)
    assert attached.controller.services.requests[0][3] == sent

    async def program() -> bytes:
        return await (await http_post(URL, [b"a", b"b" * 70000])).read()

    assert asyncio.run(program()) == b"abcdef"
    assert attached.controller.services.requests[1][3] == b"a" + b"b" * 70000


def test_parts_that_raise_end_the_request(attached: Host, web: dict[str, Site]) -> None:
    def parts() -> Iterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    response = http_post(URL, parts())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            response.status  # noqa: B018
    assert open_streams(attached) == 0


def test_a_refused_upload_tells_why(attached: Host, web: dict[str, Site]) -> None:
    with pytest.raises(DeniedError):  # not that the stream is unknown
        http_post("https://elsewhere.org", b"x" * 500_000).status  # noqa: B018
    attached.controller.services.refuse_writes = QuotaError("egress used up", "send less")
    with pytest.raises(QuotaError):
        http_post(URL, b"x" * 500_000).status  # noqa: B018
    assert open_streams(attached) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: http_get(""),
        lambda: http_get("u" * 8193),
        lambda: http_get(5),  # type: ignore[arg-type]
        lambda: http_get(URL, headers=[("a", "b")]),  # type: ignore[arg-type]
        lambda: http_get(URL, headers={"a": 1}),  # type: ignore[dict-item]
        lambda: http_get(URL, headers={str(i): "" for i in range(65)}),
        lambda: http_post(URL, 5),  # type: ignore[arg-type]
        lambda: http_post(URL, [5]).status,  # type: ignore[list-item]
        lambda: http_post(URL, None),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(web: dict[str, Site], call: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError):
        call()


def test_headers_that_no_frame_holds(attached: Host, web: dict[str, Site]) -> None:
    with pytest.raises(ArgumentError):
        http_get(URL, headers={str(i): "x" * 5000 for i in range(20)})
    attached.settle()
    assert not attached.controller.of(abi.HttpGet)
