"""What the operator sets for one inferlet, rates that slow it and limits that change while it runs,
and what it is said to wait for."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from inferlet import abi, errors

from piehost.wire import control
from piehost.wire.control import Rates
from piehost.wire.step import StepDone

from .controller_answers import outcome
from .controller_process import LIMITS, VOCAB, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, chain, setup
from .test_controller_services import next_ask
from .toy_device import greedy, ints


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess(chunk=32)
    yield process
    process.close()


def drain(controller: ControllerProcess) -> None:
    """Carries out what comes until nothing does at once."""
    while controller.collect():
        controller.serve()


def allowed(rate: int, since: float) -> float:
    """The most that the rate allows from then until now: a second's worth is saved up at first. On
    a machine that is slow it is more, so that nothing here depends on how slow."""
    return rate * (1 + time.monotonic() - since)


def done(controller: ControllerProcess, word: int) -> int:
    """Inputs of that word in all steps so far."""
    return sum(ints(step.tokens).count(word) for step in controller.device.steps)


def waits_for(controller: ControllerProcess, seat: int) -> str:
    controller.collect()
    return controller.stats().seats[seat].waits_for


def set_limits(
    controller: ControllerProcess, seat: int, rates: Rates | None = None, **limits: int
) -> None:
    merged = msgspec.structs.replace(LIMITS, **limits)
    controller.host.send(control.SetLimits(seat, merged, rates or Rates()))
    controller.stats()  # it has arrived


def left(controller: ControllerProcess, peer: Peer, key: str) -> float:
    peer.put(abi.Quota(peer.request() + 10_000))
    value: float = next_ask(controller).call.left[key]  # type: ignore[union-attr]
    return value


# --- rates --------------------------------------------------------------------


def test_a_prompt_longer_than_a_seconds_worth_goes_through_in_pieces(
    controller: ControllerProcess,
) -> None:
    """70 inputs at 20 a second: the burst, and two seconds and a half."""
    slow, peer = controller.admit(rates=Rates(tokens_per_second=20))
    free, other = controller.admit()
    prompt = [5] * 70
    began = time.monotonic()
    peer.put(*setup(prompt, 72), abi.Sample(1, Q, (OUT, 0), TOK))
    drain(controller)
    assert 20 <= done(controller, 5) <= allowed(20, began)
    assert waits_for(controller, slow) == "rate"
    other.put(*setup([1, 2], 48), *chain(2, 40, 100, []), abi.Synchronize(99, Q))
    controller.wait(other, 99)
    assert done(controller, 5) <= allowed(20, began)
    assert waits_for(controller, free) == ""
    assert controller.wait(peer, 1) == greedy(prompt, 1, VOCAB)[0]
    assert allowed(20, began) >= 70
    pieces = [ints(step.tokens).count(5) for step in controller.device.steps]
    assert max(pieces) <= 20 and sum(pieces) == 70
    stats = controller.stats().seats
    assert 0 < stats[slow].slowed_seconds <= time.monotonic() - began
    assert stats[free].slowed_seconds == 0


def test_what_cannot_be_split_goes_at_once_and_is_paid_for_afterwards(
    controller: ControllerProcess,
) -> None:
    """A mask over all inputs: more than the bucket holds."""
    _, peer = controller.admit(rates=Rates(tokens_per_second=20))
    began = time.monotonic()
    n = 30
    mask = b"".join(((2 << i) - 1).to_bytes(4, "little") for i in range(n))
    peer.put(*setup([5] * n, 32)[:-1])
    peer.put(
        abi.Forward(1, Q, (EMB, 0, n), [], (KV, 0, n), (OUT, 0, 1), None, mask),
        abi.Forward(2, Q, (EMB, 0, 1), []),
    )
    controller.wait(peer, 1)
    assert done(controller, 5) >= n
    assert controller.wait(peer, 2) is None
    assert n + 1 <= allowed(20, began)


def test_a_large_call_is_not_overtaken_for_ever_by_small_ones(
    controller: ControllerProcess,
) -> None:
    """Both from one bucket, which single tokens keep nearly empty."""
    _, peer = controller.admit(rates=Rates(tokens_per_second=40))
    peer.put(
        *setup([1], 128),
        abi.CreateQueue(None, 2),
        abi.AllocKvPage(None, 2, 9, 4),
        abi.AllocEmb(None, 2, 9, 30),
        abi.EmbedTxt(None, 2, (9, 0), [5] * 30, 0),
        abi.Synchronize(1, 2),
        *chain(1, 120, 100, []),
    )
    controller.wait(peer, 1)
    peer.put(abi.Forward(2, 2, (9, 0, 30), [], (9, 0, 30)))
    controller.wait(peer, 2)
    peer.arrived()
    assert not peer.answered(199)


def test_commands_beyond_the_rate_wait_and_none_fails(controller: ControllerProcess) -> None:
    """90 at 40 a second, in frames of 30: the second frame stops half-way."""
    slow, peer = controller.admit(rates=Rates(commands_per_second=40))
    _, other = controller.admit()
    began = time.monotonic()
    for first in (0, 30, 60):
        peer.put(*[abi.Tokenize(i, 0, "w1") for i in range(first, first + 30)])
    controller.collect()
    assert 40 <= len(peer.arrived()) <= allowed(40, began)
    assert waits_for(controller, slow) == "rate"
    assert other.ask(abi.Tokenize(1, 0, "w7")) == [7]
    assert peer.wait(89) == [1]
    assert allowed(40, began) >= 90
    assert peer.order == list(range(90))
    assert controller.stats().seats[slow].slowed_seconds > 0


def test_who_is_slowed_holds_its_commands_up_by_its_own_socket(
    controller: ControllerProcess,
) -> None:
    """The controller keeps no more than a read of it, and the rest stays where it is."""
    _, peer = controller.admit(rates=Rates(commands_per_second=5))
    peer.sock.setblocking(False)
    frame = msgspec.msgpack.encode([abi.Tokenize(None, 0, "w1 " * 1000)])
    sent = 0
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            sent += peer.sock.send(abi.frame_header(len(frame)) + frame)
    controller.collect()  # it has read as much as it will
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            sent += peer.sock.send(bytes(65536))
    assert sent < 2 << 20


def test_a_slowed_inferlet_that_closes_its_connection_costs_nothing(
    controller: ControllerProcess,
) -> None:
    """Its end is an event that does not go away; it is looked at when its rate allows. And when the
    process is dead, what it wrote still counts, at once."""
    slow, peer = controller.admit(rates=Rates(commands_per_second=1))
    _, other = controller.admit()
    peer.put(*[abi.Send(None, b"%d" % i) for i in range(10)])
    peer.sock.close()
    controller.collect()
    states = []
    for _ in range(30):
        time.sleep(0.01)
        states.append(state(controller))
    assert states.count("S") > 15
    assert other.ask(abi.Tokenize(1, 0, "w7")) == [7]
    controller.release(slow)
    sent = [message.data for message in controller.inbox if isinstance(message, control.Sent)]
    assert sent == [b"%d" % i for i in range(10)]


def test_what_fails_is_told_so_whatever_its_rate(controller: ControllerProcess) -> None:
    """The first leaves a debt of 99 tokens, a minute and a half, and comes to nothing."""
    _, peer = controller.admit(rates=Rates(tokens_per_second=1))
    n = 100
    peer.put(
        *setup([5] * n, 104)[:-1],
        abi.Forward(1, Q, (EMB, 0, n), [], (KV, 0, n), mask=bytes(n * 13)),
        abi.Forward(2, Q, (EMB, 0, 1), []),
    )
    (step,) = controller.collect()
    controller.waiting.clear()
    controller.backend.send(StepDone(step.step, error="no memory"))
    assert outcome(controller, peer, 1) is errors.BackendError
    assert outcome(controller, peer, 2) is errors.BackendError


def test_of_two_that_go_on_together_the_first_may_end_the_second(
    controller: ControllerProcess,
) -> None:
    """The older one asks for the pages that the newer one has, and nobody can swap."""
    rates = Rates(commands_per_second=2)
    (_, older), (newer, young) = (controller.admit(rates=rates) for _ in range(2))
    young.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 60))
    assert young.wait(1) is None
    older.put(abi.Tokenize(None, 0, "w1"), abi.Tokenize(None, 0, "w1"))
    older.put(abi.CreateQueue(None, Q), abi.AllocKvPage(2, Q, KV, 10))
    controller.collect()
    young.put(abi.Tokenize(None, 0, "w1"), abi.Tokenize(None, 0, "w1"))
    controller.collect()
    controller.process.send_signal(signal.SIGSTOP)
    time.sleep(1)  # both are due
    controller.process.send_signal(signal.SIGCONT)
    assert controller.from_host(control.End).seat == newer
    assert older.wait(2) is None


def state(controller: ControllerProcess) -> str:
    """ "S" when it sleeps, "R" when it runs or would."""
    stat = Path(f"/proc/{controller.process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


# --- set while it runs --------------------------------------------------------


def test_a_rate_set_while_it_holds_up_counts_at_once(controller: ControllerProcess) -> None:
    """At one a second both would take minutes: the call in one piece leaves a debt of 99 tokens."""
    seat, peer = controller.admit(rates=Rates(tokens_per_second=1, commands_per_second=1000))
    n = 100
    peer.put(
        *setup([5] * n, 104)[:-1],
        abi.Forward(None, Q, (EMB, 0, n), [], (KV, 0, n), mask=bytes(n * 13)),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, n)]),
        abi.Synchronize(1, Q),
    )
    drain(controller)
    assert waits_for(controller, seat) == "rate"
    set_limits(controller, seat, Rates(commands_per_second=1))
    assert controller.wait(peer, 1) is None
    peer.put(*[abi.Tokenize(i, 0, "w1") for i in range(2, 202)])
    controller.collect()
    assert waits_for(controller, seat) == "rate"
    set_limits(controller, seat)
    assert peer.wait(201) == [1]
    assert controller.stats().seats[seat].slowed_seconds > 0


def test_a_share_set_while_it_runs_counts_at_once(controller: ControllerProcess) -> None:
    seats = []
    for user, word in (("a", 5), ("b", 7)):
        seat, peer = controller.admit(user=user)
        seats.append(seat)
        peer.put(
            *setup([word] * 64, 64)[:-1],
            *[abi.Forward(None, Q, (EMB, 0, 64), [], (KV, 0, 64)) for _ in range(60)],
        )
    set_limits(controller, seats[0], Rates(share=400))
    counts = []
    for _ in range(50):
        controller.collect()
        counts += [token for step in controller.serve() for token in ints(step.tokens)]
    assert 3 < counts.count(5) / counts.count(7) < 5


def test_a_lower_limit_takes_nothing_away_and_refuses_what_is_new(
    controller: ControllerProcess,
) -> None:
    prompt = list(range(1, 61))
    seat, peer = controller.admit()
    peer.put(*setup(prompt, 64), abi.Sample(1, Q, (OUT, 0), TOK))
    first = controller.wait(peer, 1)
    set_limits(controller, seat, kv_pages=2, embeds=1, tokens=0, history=0)
    for key in ("kv_pages", "embeds", "tokens", "history"):
        assert left(controller, peer, key) == 0
    peer.put(abi.AllocKvPage(2, Q, 9, 1))
    assert outcome(controller, peer, 2) is errors.QuotaError
    peer.put(abi.Synchronize(3, Q))
    assert outcome(controller, peer, 3) is errors.QuotaError
    peer.put(  # the prompt's eight pages can be read, and the token's handle used again
        abi.EmbedTxt(None, Q, (EMB, 0), [first], 60),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 60)], (KV, 60, 1), (OUT, 0, 1)),
        abi.Sample(4, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 4) == greedy(prompt, 2, VOCAB)[1]
    peer.put(abi.DeallocKvPage(5, Q, KV))
    assert outcome(controller, peer, 5) is None
    assert left(controller, peer, "kv_pages") == 2
    set_limits(controller, seat, kv_pages=3)
    peer.put(abi.AllocKvPage(6, Q, 9, 3), abi.AllocKvPage(7, Q, 10, 1))
    assert outcome(controller, peer, 6) is None
    assert outcome(controller, peer, 7) is errors.QuotaError


def test_the_rings_keep_the_size_that_they_are_mapped_with(controller: ControllerProcess) -> None:
    seat, peer = controller.admit(ring_bytes=64)
    peer.put(*setup([1, 2], 8), abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    set_limits(controller, seat, ring_bytes=1 << 20)
    peer.put(abi.GetNextDist(2, Q, (OUT, 0), 4, 64))
    assert outcome(controller, peer, 2) is errors.ArgumentError


def test_limits_for_who_has_gone_are_dropped(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    peer.sock.close()
    set_limits(controller, seat, Rates(tokens_per_second=1))
    controller.release(seat)
    set_limits(controller, seat)
    _, other = controller.admit()
    assert other.ask(abi.Tokenize(1, 0, "w7")) == [7]


# --- what it waits for --------------------------------------------------------


def test_what_an_inferlet_waits_for_is_said_in_a_word(controller: ControllerProcess) -> None:
    seat, peer = controller.admit(user="a")
    _, hog = controller.admit(user="b")
    peer.put(*setup([1, 2], 8), abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    assert waits_for(controller, seat) == ""
    peer.put(abi.Receive(2))
    assert waits_for(controller, seat) == "message"
    peer.put(abi.StoreGet(3, "k"))
    next_ask(controller)
    assert waits_for(controller, seat) == "service"
    peer.put(abi.Sample(4, Q, (OUT, 0), TOK))
    assert len(controller.collect()) == 1
    assert waits_for(controller, seat) == "step"
    controller.serve()
    hog.put(*setup([5] * 200, 200), abi.Synchronize(1, Q))
    assert len(controller.collect()) == 2, "both are the other's"
    peer.put(abi.Sample(5, Q, (OUT, 0), TOK))
    controller.collect()
    assert waits_for(controller, seat) == "share"
    controller.wait(peer, 5)
    controller.wait(hog, 1)
