"""A scripted model sees exactly the slots that a step lets it attend to, each at its position."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from piehost.gpu_backend.scripted import ScriptedBackend
from piehost.wire.step import Step

from .scripted_backend import PAGE, VOCAB, Rings, backend_of
from .scripted_backend import rings as rings
from .scripted_backend import unscripted as unscripted
from .step_driver import i32
from .toy_device import ToyDevice


def random_step(number: int, seed: int, toy: ToyDevice) -> Step:
    """A step of everything: two paged segments behind what is there, listed ones with and without
    masks, copies, hidden and shown and cleared slots. Valid as the controller's steps are."""
    rng = random.Random(seed)
    pages = rng.sample(range(8), 8)
    step: dict[str, Any] = {"clear_pages": i32(pages[:2])}
    written = [slot for slot in toy.slots if slot // PAGE not in pages[:2]]
    loose = [slot for slot in written if slot // PAGE in pages[4:]]
    cleared = rng.sample(loose, min(2, len(loose)))
    step["clear_slots"] = i32(cleared)
    loose = [slot for slot in loose if slot not in cleared]
    targets = [pages[4] * PAGE + i for i in rng.sample(range(PAGE), 3)]
    sources = [rng.choice(loose) if loose else targets[0] for _ in targets]
    step |= {"copy_source": i32(sources), "copy_target": i32(targets)}
    step["hide"] = i32(rng.sample(loose, min(3, len(loose))))
    step["show"] = i32(rng.sample(loose, min(2, len(loose))))
    tokens: list[int] = []
    positions: list[int] = []
    writes: list[int] = []
    paged, listed, listed_slots, masks = [], [], [], []
    for page in pages[:2]:  # empty pages, so that the run is regular
        count, base = rng.randint(1, PAGE), rng.randint(0, 50)
        tokens += [rng.randrange(VOCAB) for _ in range(count)]
        positions += range(base, base + count)
        writes += range(page * PAGE, page * PAGE + count)
        paged.append((count, page))
    for page in pages[2:4]:
        count = rng.randint(1, 4)
        own = [page * PAGE + i for i in rng.sample(range(PAGE), count)]
        others = [slot for slot in written if slot // PAGE in pages[4:] and slot not in targets]
        reads = rng.sample(others, min(rng.randint(0, 12), len(others)))
        tokens += [rng.randrange(VOCAB) for _ in range(count)]
        positions += rng.sample(range(60), count)
        writes += own
        listed.append((count, len(reads) + count))
        listed_slots += reads + own
        width = (len(reads) + count + 7) // 8
        masks.append(rng.choice([None, rng.randbytes(width * count)]))
    keep = rng.sample(range(len(tokens)), rng.randint(1, len(tokens)))
    return Step(
        number,
        **step,
        tokens=i32(tokens),
        positions=i32(positions),
        write_slots=i32(writes),
        paged_inputs=i32([count for count, _ in paged]),
        paged_kv=i32([count for count, _ in paged]),
        paged_pages=i32([page for _, page in paged]),
        listed_inputs=i32([count for count, _ in listed]),
        listed_kv=i32([kv for _, kv in listed]),
        listed_slots=i32(listed_slots),
        listed_masks=masks,
        keep_inputs=i32(keep),
        keep_rows=i32(range(len(keep))),
    )


def look(attended: list[tuple[int, int]], number: int = 0) -> Step:
    """A step whose row 0 is the hidden state that attends to just these (position, token)s."""
    count = len(attended)
    return Step(
        number,
        tokens=i32([token for _, token in attended]),
        positions=i32([position for position, _ in attended]),
        write_slots=i32(range(count)),
        listed_inputs=i32([count]),
        listed_kv=i32([count]),
        listed_slots=i32(range(count)),
        listed_masks=[b"\xff" * ((count + 7) // 8 * count)],
        keep_inputs=i32([0]),
        keep_rows=i32([0]),
    )


def test_hidden_states_are_what_the_toy_device_attends_to(
    unscripted: ScriptedBackend, rings: Rings, tmp_path: Path
) -> None:
    toy = ToyDevice(PAGE, VOCAB)
    plain = Rings(backend_of(tmp_path, ""))  # attends to the same, in the simplest way
    sizes = set()
    for number in range(80):
        step = random_step(number, number, toy)
        toy.run(step)
        assert unscripted.run(step).error is None
        for row in range(len(step.keep_rows) // 4):
            held = toy.rows[row]
            assert not isinstance(held, bytes)
            attended = sorted((position, item) for position, item in held if type(item) is int)
            if attended:
                assert plain.backend.run(look(attended)).error is None
                assert rings.read(number, row, 5) == plain.read(number, 0, 5), (number, row)
                sizes.add(len(attended))
    assert len(sizes) > 10
    plain.close()


def test_the_order_of_slots_does_not_matter_and_any_position_does(
    unscripted: ScriptedBackend, rings: Rings
) -> None:
    def state(positions: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
        assert unscripted.run(look(list(zip(positions, tokens, strict=True)))).error is None
        return rings.read(1, 0)

    first = state([0, 1, 2], [7, 8, 9])
    assert state([2, 0, 1], [9, 7, 8]) == first
    assert state([0, 1, 3], [7, 8, 9]) != first
    assert state([0, 1, 2], [7, 8, 10]) != first
