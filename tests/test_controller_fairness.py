"""Users share the accelerator and the controller by their shares, however many inferlets they have.

Counted in steps and in work done, never in seconds: a real controller, a toy accelerator that the
test answers for. A step has room for 48 inputs here, 32 of them of prompts.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator

import pytest
from inferlet import abi

from piehost.wire.control import Rates, Release, Released, Sent
from piehost.wire.step import Step

from .controller_answers import outcome
from .controller_process import ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, SPIN, TOK, Q, chain, chats, setup
from .toy_device import ints

CHUNK, STEP = 32, 48
PROMPT = 64
MOST_RUN = CHUNK + 1  # what a queue gives to a step at most in these tests: a piece of a prompt


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=2048, chunk=CHUNK, step=STEP)
    yield process
    process.close()


def flood(
    controller: ControllerProcess,
    user: str,
    word: int,
    prompts: int = 50,
    rates: Rates | None = None,
    queue_priority: int = 0,
) -> Peer:
    """An inferlet that runs prompts, all of the token `word`, as fast as it can."""
    _, peer = controller.admit(user=user, rates=rates)
    peer.put(
        abi.CreateQueue(None, Q),
        abi.SetQueuePriority(None, Q, queue_priority),
        *setup([word] * PROMPT, PROMPT)[1:-1],
        *[abi.Forward(i, Q, (EMB, 0, PROMPT), [], (KV, 0, PROMPT)) for i in range(prompts)],
    )
    return peer


def many_decodes(controller: ControllerProcess, user: str, words: list[int]) -> None:
    """An inferlet with a queue for each word, that gives one input of it to each step."""
    _, peer = controller.admit(user=user, kv_pages=1000)
    for q, word in enumerate(words, 2):
        peer.put(
            abi.CreateQueue(None, q),
            abi.AllocKvPage(None, q, q, 1),
            abi.AllocEmb(None, q, q, 1),
            abi.EmbedTxt(None, q, (q, 0), [word], 0),
            *[abi.Forward(None, q, (q, 0, 1), [], (q, 0, 1)) for _ in range(30)],
        )


def served(steps: list[Step], word: int) -> int:
    """Inputs of prompts of that word."""
    return sum(ints(step.tokens).count(word) for step in steps)


def run(controller: ControllerProcess, count: int) -> list[Step]:
    """Steps, each carried out only when all has arrived that answers to the ones before made."""
    done = []
    for _ in range(count):
        controller.collect()
        done += controller.serve()
    return done


def steps_until(controller: ControllerProcess, peer: Peer, request: int) -> int:
    """How many are carried out, those under way too, before the request is answered."""
    controller.collect()
    for count in range(1000):
        peer.arrived()
        if peer.answered(request):
            peer.wait(request)
            return count
        run(controller, 1)
    raise AssertionError("it is never answered")


def bound(others: list[int], own: int) -> int:
    """docs/architecture.md, "Fairness": steps until a piece of what is ready leaves."""
    work = MOST_RUN * sum(1 + share / own for share in others)
    return 2 + math.ceil(work / CHUNK)


# --- the accelerator ----------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "own", "inferlets"),
    [([100], 100, 1), ([100], 100, 100), ([100, 100, 100], 100, 8), ([300], 100, 20)],
)
def test_nobody_waits_longer_than_the_bound_however_many_inferlets_others_have(
    controller: ControllerProcess, others: list[int], own: int, inferlets: int
) -> None:
    _, peer = controller.admit(user="one", rates=Rates(share=own))
    peer.put(*setup([1], 128), abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    for i, share in enumerate(others):
        for _ in range(inferlets):
            flood(controller, f"many {i}", 5, 20, Rates(share=share))
    run(controller, 4)
    most = bound(others, own)
    for request in range(2, 5):  # a token at a time
        at = request - 1
        peer.put(
            abi.EmbedTxt(None, Q, (EMB, 0), [7], at),
            abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, at)], (KV, at, 1), (OUT, 0, 1)),
            abi.Sample(request, Q, (OUT, 0), TOK),
        )
        assert steps_until(controller, peer, request) <= most + 1  # and the one it is in
    pieces = 3
    prompt = [9] * (pieces * CHUNK)
    peer.put(
        abi.AllocEmb(None, Q, 8, len(prompt)),
        abi.EmbedTxt(None, Q, (8, 0), prompt, 0),
        abi.Forward(5, Q, (8, 0, len(prompt)), [], (KV, 0, len(prompt))),
    )
    assert steps_until(controller, peer, 5) <= pieces * (most + 1)


@pytest.mark.parametrize(("mine", "yours"), [(100, 100), (300, 100), (100, 1000)])
def test_users_who_want_all_get_it_by_their_shares(
    controller: ControllerProcess, mine: int, yours: int
) -> None:
    """Ten inferlets against one. The distance is start-time fair queueing's own bound."""
    for _ in range(10):
        flood(controller, "me", 5, rates=Rates(share=mine))
    flood(controller, "you", 7, rates=Rates(share=yours))
    run(controller, 3)  # the first were under way before both were there
    steps = run(controller, 50)
    apart = abs(served(steps, 5) / mine - served(steps, 7) / yours)
    assert served(steps, 5) and served(steps, 7)
    assert apart <= MOST_RUN / mine + MOST_RUN / yours


def test_a_step_that_is_too_small_for_all_is_itself_shared_out(
    controller: ControllerProcess,
) -> None:
    for user, word in (("a", 500), ("b", 501)):
        many_decodes(controller, user, [word] * STEP)
    run(controller, 4)
    for step in run(controller, 10):
        assert abs(served([step], 500) - served([step], 501)) <= 2


def test_of_two_prompts_of_a_user_the_first_is_done_first(controller: ControllerProcess) -> None:
    """In turns both would be done as late as the second one has to be."""
    length = 6 * CHUNK
    for word in (5, 7):
        controller.admit()[1].put(*setup([word] * length, length))
    run(controller, 12)
    order = [token for step in controller.device.steps for token in ints(step.tokens)]
    assert order == [5] * length + [7] * length


def test_an_inferlets_own_queues_take_turns(controller: ControllerProcess) -> None:
    words = [*range(100, 100 + 2 * STEP)]
    many_decodes(controller, "", words)
    run(controller, 4)
    steps = run(controller, 10)
    assert {served(steps, word) for word in words} <= {4, 5, 6}


def test_who_was_away_has_saved_up_nothing(controller: ControllerProcess) -> None:
    """One user for itself, then both: as if the other had been there all the time, and the other
    way round."""
    _, idle = controller.admit(user="idle")
    idle.put(*setup([1], 8), abi.Synchronize(1, Q))
    controller.wait(idle, 1)
    flood(controller, "busy", 5, 200)
    run(controller, 60)
    flood(controller, "idle", 7, 8)
    steps = run(controller, 12)
    assert abs(served(steps, 5) - served(steps, 7)) <= 2 * MOST_RUN
    run(controller, 60)  # the short one is done, the other is alone again
    flood(controller, "idle", 9, 8)
    steps = run(controller, 12)
    assert abs(served(steps, 5) - served(steps, 9)) <= 2 * MOST_RUN


def test_a_users_next_inferlet_takes_over_what_the_last_one_had(
    controller: ControllerProcess,
) -> None:
    """With a share of 1 a piece of a prompt is worth a hundred of the other's. An inferlet that
    ends after each and is launched again is not to be better off."""
    flood(controller, "steady", 5, 200)
    steps = []
    for _ in range(10):
        peer = flood(controller, "again", 7, 1, Rates(share=1))
        steps += run(controller, 4)
        peer.sock.close()
        controller.release(controller._seats)
    assert served(steps, 7) <= 2 * CHUNK


@pytest.mark.parametrize("mine", [-8, 7])
def test_an_inferlets_queue_priority_matters_to_nobody_elses_user(
    controller: ControllerProcess, mine: int
) -> None:
    flood(controller, "me", 5, queue_priority=mine)
    flood(controller, "you", 7)
    steps = run(controller, 20)
    assert abs(served(steps, 5) - served(steps, 7)) <= 2 * MOST_RUN


def test_within_a_user_the_operators_word_goes_before_the_inferlets(
    controller: ControllerProcess,
) -> None:
    flood(controller, "me", 5)
    run(controller, 3)
    flood(controller, "me", 7, 4, queue_priority=7)
    flood(controller, "me", 9, 4, Rates(priority=1), queue_priority=-8)
    run(controller, 20)
    order = [token for step in controller.device.steps for token in ints(step.tokens)]
    first = order.index(9)  # what was under way is before it
    assert order[first:] == [9] * 4 * PROMPT + [7] * 4 * PROMPT + [5] * (len(order) - first - 512)


def test_a_step_has_a_bound_and_a_users_inferlets_take_turns_at_it(
    controller: ControllerProcess,
) -> None:
    """Twice as many decode as a step has room for, half of them queues of one inferlet."""
    peers = [controller.admit()[1] for _ in range(STEP - 1)]
    for i, peer in enumerate(peers):
        peer.put(*setup([i], 32), abi.Synchronize(1, Q))
        controller.wait(peer, 1)
    many_decodes(controller, "", [500] * STEP)
    controller.collect()
    for peer in peers:
        peer.put(*chain(1, 30, 100, []))
    before = controller.stats().seats
    steps = run(controller, 24)
    after = controller.stats().seats
    assert {len(ints(step.tokens)) for step in steps[2:]} == {STEP}
    shares = [after[seat].tokens_in - before[seat].tokens_in for seat in after]
    assert min(shares) >= 20  # all room is theirs by rights: they have had less than the hog


def test_who_finds_no_room_goes_in_the_step_right_behind(controller: ControllerProcess) -> None:
    """Before the full one is answered: they wait for room, not for an answer."""
    _, first = controller.admit()
    first.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    assert len(controller.collect()) == 1
    for _ in range(STEP + 12):
        _, peer = controller.admit()
        peer.put(*setup([1], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    assert len(controller.collect()) == 1
    controller.serve()
    assert [len(ints(step.tokens)) for step in controller.collect()] == [STEP, 12]


def test_an_eager_step_goes_to_the_user_who_has_had_least() -> None:
    controller = ControllerProcess(pages=2048, chunk=CHUNK, step=STEP, policy="eager")
    for _ in range(5):
        flood(controller, "me", 5)
    flood(controller, "you", 7)
    steps = run(controller, 30)
    assert abs(served(steps, 5) - served(steps, 7)) <= 2 * MOST_RUN
    controller.close()


# --- the controller -----------------------------------------------------------


def test_many_who_each_send_one_heavy_call_and_wait_hold_up_others_for_one_at_a_time() -> None:
    """What a call costs is the controller's time, so it is that which is shared out: whoever took
    less of it is heard after a call or two of the others, not after one of each."""
    controller = ControllerProcess(chat_template=SPIN)
    hogs = [controller.admit(user="hogs")[1] for _ in range(6)]
    others = [controller.admit(user=user)[1] for user in ("other", "hogs")]
    for hog in hogs:
        hog.sock.sendall(chats(1))
    for hog in hogs:
        outcome(controller, hog, 0)
    sent = [1] * len(hogs)
    answered = len(hogs)
    rounds = 3
    for i in range(rounds):
        for peer in others:
            controller.process.send_signal(signal.SIGSTOP)
            for n, hog in enumerate(hogs):
                if len(hog.arrived()) == sent[n]:  # it has its answer, and calls again
                    hog.sock.sendall(chats(1, first=sent[n]))
                    sent[n] += 1
            peer.put(abi.Tokenize(i, 0, "w1"))
            controller.process.send_signal(signal.SIGCONT)
            peer.wait(i)
    answered = sum(len(hog.arrived()) for hog in hogs) - answered
    assert answered <= 3 * rounds * len(others)
    controller.close()


def test_bookkeeping_of_pages_is_shared_out_between_a_users_inferlets() -> None:
    """Each pair looks through all that a user may in a turn, so one of the two goes on in each."""
    controller = ControllerProcess(pages=16384)
    peers = [controller.admit(kv_pages=8192)[1] for _ in range(2)]
    pairs = 30
    for peer in peers:
        peer.put(
            abi.CreateQueue(None, Q),
            *[
                command
                for i in range(pairs)
                for command in (abi.AllocKvPage(None, Q, KV, 8000), abi.DeallocKvPage(i, Q, KV))
            ],
        )
    first, second = peers
    first.wait(pairs - 1, timeout=60)
    assert len(second.arrived()) >= pairs // 2
    controller.close()


def test_forwards_of_many_spans_are_bookkeeping_too(controller: ControllerProcess) -> None:
    """A step would have room for all forty of them."""
    _, peer = controller.admit()
    peer.put(*setup([1], 200), *[abi.CreateQueue(None, q) for q in range(2, 42)])
    peer.put(abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    spans = [(KV, 2 * i, 1) for i in range(100)]
    peer.put(*[abi.Forward(q, q, (EMB, 0, 1), spans, None) for q in range(2, 42)])
    steps = run(controller, 2)
    assert [len(ints(step.tokens)) for step in steps] == [20, 20]
    assert controller.wait(peer, 41) is None
    assert peer.order == [*range(1, 42)]


def test_what_a_dead_inferlet_wrote_counts_when_its_turn_comes() -> None:
    """Its user has others in line before it, whose calls took less of the controller so far."""
    controller = ControllerProcess(chat_template=SPIN)
    dead, peer = controller.admit()
    other = controller.admit()[1]
    hogs = [controller.admit()[1] for _ in range(3)]
    peer.sock.sendall(chats(1))
    outcome(controller, peer, 0)
    for hog in hogs:
        hog.sock.sendall(chats(2))
    peer.put(*[abi.Send(None, b"%d" % i) for i in range(3)])
    peer.sock.close()
    controller.host.send(Release(dead))
    assert other.ask(abi.Tokenize(1, 0, "w7")) == [7]
    controller.from_host(Released, timeout=60)
    sent = [message.data for message in controller.inbox if isinstance(message, Sent)]
    assert sent == [b"0", b"1", b"2"]
    assert [*controller.stats().seats] == [2, 3, 4, 5]
    controller.close()


def test_who_waits_for_pages_saves_up_nothing_either() -> None:
    """It has commands all the while, but none that the accelerator could carry out."""
    controller = ControllerProcess(pages=32, chunk=CHUNK, step=STEP, swap_pages=32)
    _, busy = controller.admit(user="busy")
    busy.put(
        abi.CreateQueue(None, 2),
        abi.AllocKvPage(None, 2, 9, 16),
        *setup([5] * PROMPT, PROMPT)[:-1],
        *[abi.Forward(None, Q, (EMB, 0, PROMPT), [], (KV, 0, PROMPT)) for _ in range(100)],
    )
    run(controller, 3)
    seat, waiting = controller.admit(user="waiting")
    waiting.put(
        *setup([7] * PROMPT, 2 * PROMPT)[:-1],
        *[abi.Forward(None, Q, (EMB, 0, PROMPT), [], (KV, 0, PROMPT)) for _ in range(50)],
    )
    run(controller, 60)
    assert controller.stats().seats[seat].waits_for == "pages"
    busy.ask(abi.DeallocKvPage(1, 2, 9))
    steps = []
    while not served(steps, 7):
        steps += run(controller, 1)
    steps = run(controller, 16)
    assert abs(served(steps, 5) - served(steps, 7)) <= 2 * MOST_RUN
    controller.close()
