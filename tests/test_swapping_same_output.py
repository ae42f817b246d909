"""What programs get is the same however often their pages go to host memory and come back: random
programs against `sequential.py`, and a real model against itself in a pool that is large enough."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from inferlet import abi

from piehost.gpu_backend.backend import Backend
from piehost.wire.step import Step, StepDone

from .checkpoints import make_checkpoint
from .controller_process import PAGE, VOCAB, ControllerProcess
from .controller_programs import EMB, KV, TOK, Q, chain, setup
from .controller_swapping import PAGES, PLACES, leave, nobody_ended
from .random_play import Play
from .toy_device import ToyDevice

# --- random programs ----------------------------------------------------------


@pytest.fixture(scope="module")
def crowded() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=PAGES, swap_pages=PLACES, chunk=20)
    yield process
    process.close()


def play_four(crowded: ControllerProcess, seed: int) -> None:
    """Four programs, any of which may take nearly all pages; some end on the way."""
    leave(crowded)  # what a seed that failed has left
    choice = random.Random(seed)
    plays = [Play(crowded, 1000 * seed + i) for i in range(4)]
    for _ in range(6):
        playing = choice.sample(plays, choice.randrange(1, len(plays) + 1))
        for play in playing:
            play.begin()
        for play in choice.sample(playing, len(playing)):
            play.finish()
        if choice.random() < 0.15:
            gone = choice.randrange(len(plays))
            crowded.release(plays[gone].seat)
            plays[gone] = Play(crowded, 1000 * seed + 100 + choice.randrange(100))
    for play in plays:
        play.check_counters()
    nobody_ended(crowded)
    leave(crowded)


@pytest.mark.parametrize("seed", range(40))
def test_no_answer_differs_however_often_pages_move(crowded: ControllerProcess, seed: int) -> None:
    play_four(crowded, seed)


def test_the_random_programs_do_swap(crowded: ControllerProcess) -> None:
    before = crowded.stats().total
    for seed in range(8):
        play_four(crowded, seed)
    after = crowded.stats().total
    assert after.swapped_out - before.swapped_out > 100
    assert after.swapped_in - before.swapped_in > 60


# --- a real model -------------------------------------------------------------


class RealDevice(ToyDevice):
    """A model on torch that stands where the toy does."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(PAGE, VOCAB)
        self.backend = backend

    def run(self, step: Step) -> StepDone:
        done = self.backend.run(step)
        assert done.error is None
        return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(make_checkpoint(folder, seed=6, vocab_size=VOCAB))


def stories(controller: ControllerProcess, rounds: int) -> list[list[int]]:
    """What three inferlets generate, turn by turn, each after a prompt of its own: plainly, from a
    fork, around hidden slots, with a mask."""
    peers = []
    for i in range(3):
        prompt = [(13 * i + 7 * k) % 300 + 3 for k in range(30 + 9 * i)]
        _, peer = controller.admit()
        peer.put(*setup(prompt, 8 * PAGE), abi.ShareKvPage(None, Q, 7, KV, 0, 3))
        peer.put(abi.AllocKvPage(None, Q, 8, 5), abi.Synchronize(1, Q))
        assert controller.wait(peer, 1) is None
        peers.append((peer, len(prompt)))
    told: list[list[int]] = [[], [], []]
    for turn in range(rounds):
        for story, (peer, start) in zip(told, peers, strict=True):
            at, request = start + 3 * turn, 100 + 10 * turn
            peer.put(*chain(at, 4, request, []))
            reads: list[abi.Span] = [(7, 0, 3 * PAGE)]
            peer.put(
                abi.MaskKvPage(None, Q, (8, 0, 2), turn % 2 == 0),
                abi.EmbedTxt(None, Q, (EMB, 0), [~TOK, 5], at),
                abi.Forward(None, Q, (EMB, 0, 2), reads, (8, 2 * turn, 2), (EMB, 0, 2)),
                abi.Sample(request + 4, Q, (EMB, 1), 9),
                abi.EmbedTxt(None, Q, (EMB, 0), [~9], at),
                abi.Forward(
                    *(None, Q, (EMB, 0, 1), [*reads, (8, 0, 4)], None, (EMB, 0, 1), None),
                    bytes([0x55, 0xAA, 0xFF, 0x1F]),
                ),
                abi.Sample(request + 5, Q, (EMB, 0), 9),
                abi.DeallocKvPage(None, Q, 7),
                abi.ShareKvPage(None, Q, 7, KV, 0, 3),
            )
            story += [controller.wait(peer, request + i) for i in range(6)]
    return told


def test_a_real_model_says_the_same_however_often_pages_move(checkpoint: str) -> None:
    told, moved = [], []
    for pages, places in ((64, 0), (16, 40)):
        backend = Backend(
            checkpoint, dtype="float32", page_size=PAGE, kv_pages=pages, swap_pages=places
        )
        controller = ControllerProcess(pages=pages, swap_pages=places)
        controller.device = RealDevice(backend)
        told.append(stories(controller, 3))
        total = controller.stats().total
        moved.append(total.swapped_out)
        nobody_ended(controller)
        controller.close()
    assert told[0] == told[1]
    assert moved[0] == 0 and moved[1] >= 3 * 3 * 12 - 16
    assert len({token for story in told[0] for token in story}) > 12
