"""KV pages shared by name: what an importer sees, and what holds them. The toy accelerator's tokens
depend on every slot an input attends to."""

from __future__ import annotations

import pytest
from inferlet import abi, errors

from piehost.wire.step import StepDone

from . import controller_exporters
from .controller_answers import refused, settle
from .controller_exporters import PAGES, ready
from .controller_process import PAGE, VOCAB, ControllerProcess
from .controller_programs import EMB, KV, OUT, PROMPT, SHARED, TOK, Q, chain, export, go_on, setup
from .toy_device import greedy, next_token

controller = controller_exporters.controller  # the fixture


# --- what an importer sees ----------------------------------------------------


def test_an_importer_goes_on_where_the_exporter_stood_by_plain_page_runs(
    controller: ControllerProcess,
) -> None:
    exporter = ready(controller, PROMPT, 16, user="u")
    export(exporter)
    _, importer = controller.admit(user="u")
    assert go_on(controller, importer, PROMPT, 5) == greedy([*PROMPT, 7], 5, VOCAB)
    assert importer.wait(50) == [2, b"meta"]
    assert not any(step.listed_inputs for step in controller.device.steps)


def test_export_waits_for_what_is_before_it_on_its_queue(controller: ControllerProcess) -> None:
    _, exporter = controller.admit()
    exporter.put(*setup(PROMPT, 16), abi.ExportKvPage(2, Q, "a", [(KV, 0, 2)], b"meta"))
    _, importer = controller.admit()
    assert len(controller.collect()) == 1
    importer.put(abi.CreateQueue(None, Q))
    assert refused(importer, abi.ImportKvPage(1, Q, SHARED, "a")) is errors.NotFoundError
    importer.put(abi.DestroyQueue(None, Q))
    controller.serve()
    assert exporter.wait(2) is None
    assert go_on(controller, importer, PROMPT, 3) == greedy([*PROMPT, 7], 3, VOCAB)


def test_an_export_after_a_stopped_chain_holds_what_the_chain_left(
    controller: ControllerProcess,
) -> None:
    prompt = PROMPT[: PAGE + 2]
    said = greedy(prompt, 6, VOCAB)
    _, exporter = controller.admit()
    exporter.put(
        *setup(prompt, 16),
        *chain(len(prompt), 6, 100, [said[2]]),
        abi.ExportKvPage(2, Q, "a", [(KV, 0, 2)]),
    )
    controller.wait(exporter, 2)
    kept = [*prompt, *said[:2]]
    _, importer = controller.admit()
    assert go_on(controller, importer, kept, 1) == greedy([*kept, 7], 1, VOCAB)


def test_pages_of_several_handles_lie_side_by_side(controller: ControllerProcess) -> None:
    """In order they are still a plain page run; out of order only the slots themselves count."""
    exporter = ready(controller, PROMPT, 16)
    exporter.put(
        abi.ShareKvPage(None, Q, 2, KV, 0, 1),
        abi.ShareKvPage(None, Q, 3, KV, 1, 1),
        abi.ExportKvPage(2, Q, "a", [(2, 0, 1), (3, 0, 1)]),
        abi.ExportKvPage(3, Q, "b", [(3, 0, 1), (2, 0, 1)]),
        abi.DeallocKvPage(None, Q, 2),
        abi.DeallocKvPage(None, Q, 3),
        abi.DeallocKvPage(4, Q, KV),
    )
    assert [exporter.wait(r) for r in (2, 3, 4)] == [None] * 3
    _, importer = controller.admit()
    assert go_on(controller, importer, PROMPT, 2) == greedy([*PROMPT, 7], 2, VOCAB)
    assert not any(step.listed_inputs for step in controller.device.steps)
    importer.put(
        abi.ImportKvPage(3, Q, 11, "b"),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], 24),
        abi.Forward(None, Q, (EMB, 0, 1), [(11, 8, 8)], (KV, 8, 1), (OUT, 0, 1)),
        abi.Sample(4, Q, (OUT, 0), TOK),
    )
    token = next_token((*enumerate(PROMPT[:8]), (24, 7)), VOCAB)
    assert controller.wait(importer, 4) == token, "the first page, which lies behind the second"


def test_an_export_of_half_written_pages_has_their_other_slots_unwritten(
    controller: ControllerProcess,
) -> None:
    prompt = PROMPT[: PAGE + 3]
    exporter = ready(controller, prompt, 16)
    exporter.put(abi.AllocKvPage(None, Q, 2, 1))
    exporter.put(abi.ExportKvPage(2, Q, "a", [(KV, 0, 2), (2, 0, 1)]))
    assert exporter.wait(2) is None
    _, importer = controller.admit()
    importer.put(
        abi.CreateQueue(None, Q),
        abi.ImportKvPage(None, Q, SHARED, "a"),
        abi.AllocEmb(None, Q, EMB, 1),
        abi.AllocEmb(None, Q, OUT, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], len(prompt)),
        abi.Forward(None, Q, (EMB, 0, 1), [(SHARED, 0, 24)], None, (OUT, 0, 1)),
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    token = next_token(tuple(enumerate([*prompt, 7])), VOCAB)
    assert controller.wait(importer, 1) == token


def test_what_another_queue_may_still_fail_to_write_is_not_taken_for_written(
    controller: ControllerProcess,
) -> None:
    """Queue 2 exports while queue 1's write is on its way, and that step fails: an importer that
    read by page table would see what the page's last owner left there."""
    _, exporter = controller.admit()
    exporter.put(abi.CreateQueue(None, 2), *setup(PROMPT, 16))
    assert len(controller.collect()) == 1
    exporter.put(abi.ExportKvPage(2, 2, "a", [(KV, 0, 2)], b"meta"))
    assert exporter.wait(2) is None
    controller.backend.send(StepDone(controller.waiting.pop(0).step, error="it broke"))
    settle(controller)
    _, importer = controller.admit()
    assert go_on(controller, importer, PROMPT, 1) == [next_token(((16, 7),), VOCAB)]


# --- references ---------------------------------------------------------------


def test_an_export_holds_its_pages_and_imported_handles_stay(
    controller: ControllerProcess,
) -> None:
    exporter = ready(controller, PROMPT, 16)
    export(exporter)
    assert exporter.ask(abi.DeallocKvPage(3, Q, KV)) is None
    assert controller.stats().total.pages_free == PAGES - 2
    _, importer = controller.admit()
    assert len(go_on(controller, importer, PROMPT, 1)) == 1
    assert importer.ask(abi.UnexportKvPage(60, "a")) is None, "by any inferlet of the user"
    assert refused(importer, abi.ImportKvPage(61, Q, 20, "a")) is errors.NotFoundError
    held = PAGES - controller.stats().total.pages_free
    assert held == 2 + 4, "those that it imported, and its own"
    importer.put(
        abi.Synchronize(None, Q),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], 16),
        abi.Forward(None, Q, (EMB, 0, 1), [(SHARED, 0, 16)], None, (OUT, 0, 1)),
        abi.Sample(62, Q, (OUT, 0), TOK),
    )
    assert controller.wait(importer, 62) == greedy([*PROMPT, 7], 1, VOCAB)[0]


def test_an_exporter_killed_while_an_importer_runs_changes_nothing_for_it(
    controller: ControllerProcess,
) -> None:
    _, exporter = controller.admit()
    exporter.put(*setup(PROMPT, 16), abi.Synchronize(1, Q))
    controller.wait(exporter, 1)
    export(exporter)
    _, importer = controller.admit()
    importer.put(abi.CreateQueue(None, Q), abi.ImportKvPage(1, Q, SHARED, "a"))
    importer.wait(1)
    importer.put(
        abi.AllocKvPage(None, Q, KV, 1),
        abi.AllocEmb(None, Q, EMB, 1),
        abi.AllocEmb(None, Q, OUT, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], 16),
        abi.Forward(None, Q, (EMB, 0, 1), [(SHARED, 0, 16)], (KV, 0, 1), (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert len(controller.collect()) == 1
    controller.release(1)
    assert controller.stats().total.pages_free == PAGES - 3
    _, newcomer = controller.admit()
    newcomer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, PAGES - 3))
    assert controller.wait(importer, 2) == greedy([*PROMPT, 7], 1, VOCAB)[0]
    assert newcomer.wait(1) is None, "it got all the others"
    assert refused(importer, abi.ImportKvPage(3, Q, 20, "a")) is errors.NotFoundError


@pytest.mark.parametrize("how", ["copy", "mask", "forward"])
def test_a_write_does_not_overtake_the_last_read_of_an_importer_in_the_same_step(
    controller: ControllerProcess, how: str
) -> None:
    """The importer reads and lets go; then the pages are the exporter's own, who writes."""
    exporter = ready(controller, PROMPT, 24)
    export(exporter)
    _, importer = controller.admit()
    importer.put(
        abi.CreateQueue(None, Q),
        abi.ImportKvPage(None, Q, SHARED, "a"),
        abi.AllocEmb(None, Q, EMB, 1),
        abi.AllocEmb(None, Q, OUT, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], 16),
        abi.UnexportKvPage(1, "a"),
    )
    assert importer.wait(1) is None
    _, busy = controller.admit()
    busy.put(*setup([1], 8))
    assert len(controller.collect()) == 1
    importer.put(
        abi.Forward(None, Q, (EMB, 0, 1), [(SHARED, 0, 16)], None, (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
        abi.DeallocKvPage(None, Q, SHARED),
    )
    settle(controller)
    writes: dict[str, list[abi.Command]] = {
        "copy": [abi.CopyKvPage(3, Q, (KV, 16, 4), (KV, 0, 4))],
        "mask": [abi.MaskKvPage(3, Q, (KV, 0, 4), False)],
        "forward": [
            abi.EmbedTxt(None, Q, (EMB, 0), [9, 9, 9, 9], 0),
            abi.Forward(3, Q, (EMB, 0, 4), [], (KV, 0, 4), (OUT, 0, 1)),
        ],
    }
    exporter.put(*writes[how])
    settle(controller)
    assert controller.wait(importer, 2) == next_token(tuple(enumerate([*PROMPT, 7])), VOCAB)
    assert controller.wait(exporter, 3) is None


# --- lists --------------------------------------------------------------------


def test_exports_are_listed_in_order_from_where_one_likes(controller: ControllerProcess) -> None:
    seat, peer = controller.admit(export_pages=300)
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(None, Q, KV, 1))
    names = [f"n{i:03}" for i in range(280)]
    peer.put(*[abi.ExportKvPage(None, Q, name, [(KV, 0, 1)]) for name in reversed(names)])
    peer.put(abi.ExportKvPage(None, Q, "\U0001f600", [(KV, 0, 1)], b"", 1000))
    first = peer.ask(abi.ListExported(1, "n"))
    assert first == [[name, 1, f"i{seat}", None] for name in names[:256]]
    rest = peer.ask(abi.ListExported(2, "n", names[255]))
    assert [entry[0] for entry in rest] == names[256:]
    ((name, pages, exporter, left),) = peer.ask(abi.ListExported(3, "\U0001f600"))
    assert (name, pages, exporter) == ("\U0001f600", 1, f"i{seat}") and 0 < left <= 1000
    assert refused(peer, abi.ListExported(4, "\U0001f600" * 65)) is errors.ArgumentError
    peer.put(*[abi.UnexportKvPage(None, name) for name in [*names, "\U0001f600"]])
    assert peer.ask(abi.ListExported(5)) == []


def test_a_list_of_long_names_fits_a_frame(controller: ControllerProcess) -> None:
    seat, peer = controller.admit(export_pages=256)
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(None, Q, KV, 1))
    names = ["x" * 253 + f"{i:03}" for i in range(256)]
    for name in names:
        peer.put(abi.ExportKvPage(None, Q, name, [(KV, 0, 1)]))
    listed = [entry[0] for entry in peer.ask(abi.ListExported(1))]
    assert 150 < len(listed) < 256
    listed += [entry[0] for entry in peer.ask(abi.ListExported(2, "", listed[-1]))]
    assert listed == names
    controller.release(seat)
