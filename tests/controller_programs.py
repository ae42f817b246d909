"""What tests let inferlets ask of the controller: to generate, to share pages, to render chats."""

from __future__ import annotations

import msgspec
from inferlet import abi

from .controller_process import PAGE, ControllerProcess, Peer

Q, KV, EMB, OUT, TOK = 1, 1, 1, 2, 1
SHARED = 9  # the importer's handle
PROMPT = list(range(40, 40 + 2 * PAGE))  # two full pages
SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def setup(prompt: list[int], slots: int) -> list[abi.Command]:
    pages = -(-slots // PAGE)
    return [
        abi.CreateQueue(None, Q),
        abi.AllocKvPage(None, Q, KV, pages),
        abi.AllocEmb(None, Q, EMB, max(len(prompt), 1)),
        abi.AllocEmb(None, Q, OUT, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), prompt, 0),
        abi.Forward(None, Q, (EMB, 0, len(prompt)), [], (KV, 0, len(prompt)), (OUT, 0, 1)),
    ]


def chain(start: int, count: int, first_request: int, stop: list[int]) -> list[abi.Command]:
    """Sample, then `count - 1` times embed that token at `start`, `start` + 1, ... and sample."""
    commands: list[abi.Command] = [
        abi.Sample(first_request, Q, (OUT, 0), TOK, stop=stop, lazy=True)
    ]
    for i in range(count - 1):
        at = start + i
        commands += [
            abi.EmbedTxt(None, Q, (EMB, 0), [~TOK], at),
            abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, at)], (KV, at, 1), (OUT, 0, 1)),
            abi.Sample(first_request + i + 1, Q, (OUT, 0), TOK, stop=stop, lazy=True),
        ]
    return commands


def export(peer: Peer, name: str = "a", pages: int = 2, lease: int | None = None) -> None:
    peer.put(abi.ExportKvPage(2, Q, name, [(KV, 0, pages)], b"meta", lease))
    assert peer.wait(2) is None


def go_on(controller: ControllerProcess, peer: Peer, prompt: list[int], count: int) -> list[int]:
    """Imports "a", whose pages hold `prompt`, and generates after it in pages of its own."""
    start = len(prompt)
    commands: list[abi.Command] = [
        abi.CreateQueue(None, Q),
        abi.ImportKvPage(50, Q, SHARED, "a"),
        abi.AllocKvPage(None, Q, KV, 4),
        abi.AllocEmb(None, Q, EMB, 1),
        abi.AllocEmb(None, Q, OUT, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], start),
    ]
    for i in range(count):
        reads = [(SHARED, 0, start)] + ([(KV, 0, i)] if i else [])
        commands += [
            abi.Forward(None, Q, (EMB, 0, 1), reads, (KV, i, 1), (OUT, 0, 1)),
            abi.Sample(100 + i, Q, (OUT, 0), TOK),
            abi.EmbedTxt(None, Q, (EMB, 0), [~TOK], start + i + 1),
        ]
    peer.put(*commands)
    return [controller.wait(peer, 100 + i) for i in range(count)]


def chats(count: int, first: int = 0) -> bytes:
    """Frames of one `chat` each; a rendering of SPIN takes the tenth of a second it may."""
    frames = b""
    for i in range(first, first + count):
        body = msgspec.msgpack.encode([abi.Chat(i, 0, [{"role": "user", "content": ""}])])
        frames += abi.frame_header(len(body)) + body
    return frames
