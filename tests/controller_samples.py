"""Inferlets that stand behind a prompt and sample there, and what then comes without control."""

from __future__ import annotations

from typing import Any

from inferlet import abi

from .controller_process import VOCAB, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, setup
from .toy_device import greedy, next_token, vector

HIST = 1
WIDTH = VOCAB // 8
PROMPT = [1, 2, 3]
FIRST = greedy(PROMPT, 1, VOCAB)[0]  # what comes without control
VECTOR = vector(tuple(enumerate(PROMPT)))


def admit(controller: ControllerProcess, slots: int = 64, **limits: Any) -> Peer:
    """OUT is what `PROMPT` leads to; every step has been answered."""
    _, peer = controller.admit(**limits)
    peer.put(*setup(PROMPT, slots), abi.Synchronize(99, Q))
    assert controller.wait(peer, 99) is None
    return peer


def answers(controller: ControllerProcess, peer: Peer, *requests: int) -> list[Any]:
    return [controller.wait(peer, request) for request in requests]


def sample(request: int | None = 1, token: int = TOK, **fields: Any) -> abi.Sample:
    return abi.Sample(request, Q, (OUT, 0), token, **fields)


def after(*tokens: int) -> int:
    """The plain token after the prompt and these."""
    return next_token(tuple(enumerate([*PROMPT, *tokens])), VOCAB)


def goes_on(at: int, *tokens: int) -> list[abi.Command]:
    """Embeds tokens at `at`, behind what is written, and leads OUT there."""
    n = len(tokens)
    return [
        abi.EmbedTxt(None, Q, (EMB, 0), [*tokens], at),
        abi.Forward(None, Q, (EMB, 0, n), [(KV, 0, at)], (KV, at, n), (OUT, 0, 1)),
    ]
