"""KV pages shared by name: what an importer sees, who may, for how long, and who goes first when
pages run out. The toy accelerator's tokens depend on every slot an input attends to."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from inferlet import abi, errors

from piehost.wire import control
from piehost.wire.step import StepDone

from .controller_answers import refused, settle
from .controller_process import PAGE, VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, PROMPT, SHARED, TOK, Q, chain, export, go_on, setup
from .toy_device import greedy, next_token

PAGES = 64


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    """Each test must leave no page held."""
    process = ControllerProcess(pages=PAGES)
    yield process
    while process.collect():
        process.serve()
    for seat in process.stats().seats:
        process.release(seat)
    names = [abi.UnexportKvPage(None, name) for name in ("a", "b", "c")]
    for user in ("", "u"):
        seat, peer = process.admit(user=user)
        peer.put(*names)
        settle(process)
        process.release(seat)
    total = process.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (PAGES, 256, 0)
    process.close()


def ready(controller: ControllerProcess, prompt: list[int], slots: int, **admit: str) -> Peer:
    """An inferlet that has run `prompt`."""
    _, peer = controller.admit(**admit)  # type: ignore[arg-type]
    peer.put(*setup(prompt, slots), abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    return peer


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


# --- writes and references ----------------------------------------------------


def test_nobody_writes_into_exported_pages_until_they_are_one_s_own_again(
    controller: ControllerProcess,
) -> None:
    exporter = ready(controller, PROMPT[:4], 16)
    export(exporter)
    _, importer = controller.admit()
    importer.put(abi.CreateQueue(None, Q))
    assert importer.ask(abi.ImportKvPage(1, Q, KV, "a")) == [2, b"meta"]
    for peer in (exporter, importer):
        assert refused(peer, abi.MaskKvPage(11, Q, (KV, 0, 1), False)) is errors.SharedPageError
        assert isinstance(_error(peer, abi.Synchronize(12, Q)), errors.SharedPageError)
    assert exporter.ask(abi.UnexportKvPage(13, "a")) is None
    assert refused(exporter, abi.MaskKvPage(14, Q, (KV, 0, 1), False)) is errors.SharedPageError
    _error(exporter, abi.Synchronize(15, Q))
    assert importer.ask(abi.DeallocKvPage(16, Q, KV)) is None
    exporter.put(abi.MaskKvPage(17, Q, (KV, 0, 1), False))
    assert controller.wait(exporter, 17) is None


def _error(peer: Peer, command: abi.Command) -> errors.InferletError:
    with pytest.raises(AnswerError) as caught:
        peer.ask(command)
    error = caught.value
    return errors.from_answer(error.code, error.message, error.hint)


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


# --- who may, and how much ----------------------------------------------------


def test_another_user_s_exports_do_not_exist(controller: ControllerProcess) -> None:
    exporter = ready(controller, PROMPT, 16, user="u")
    export(exporter)
    mine = ready(controller, PROMPT[:3], 8)
    assert mine.ask(abi.ListExported(3)) == []
    assert refused(mine, abi.UnexportKvPage(4, "a")) is errors.NotFoundError
    assert refused(mine, abi.ImportKvPage(5, Q, 9, "a")) is errors.NotFoundError
    _error(mine, abi.Synchronize(6, Q))
    mine.put(abi.ExportKvPage(7, Q, "a", [(KV, 0, 1)], b"mine"))
    assert mine.wait(7) is None, "names are a user's own"
    assert mine.ask(abi.UnexportKvPage(8, "a")) is None
    assert [entry[0] for entry in exporter.ask(abi.ListExported(9))] == ["a"]


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


WRONG: dict[str, tuple[abi.Command, type[errors.InferletError]]] = {
    "a name in use": (abi.ExportKvPage(9, Q, "a", [(KV, 0, 1)]), errors.ArgumentError),
    "a long name": (
        abi.ExportKvPage(9, Q, "\U0001f600" * 65, [(KV, 0, 1)]),
        errors.ArgumentError,
    ),
    "no such handle": (abi.ExportKvPage(9, Q, "b", [(77, 0, 1)]), errors.HandleError),
    "beyond the handle": (abi.ExportKvPage(9, Q, "b", [(KV, 1, 2)]), errors.SpanError),
    "far beyond": (abi.ExportKvPage(9, Q, "b", [(KV, 0xFFFFFFFF, 1)]), errors.SpanError),
    "no pages": (abi.ExportKvPage(9, Q, "b", [(KV, 0, 1), (KV, 0, 0)]), errors.ArgumentError),
    "too many": (abi.ExportKvPage(9, Q, "b", [(KV, 0, 2)] * 16), errors.QuotaError),
    "far too many": (abi.ExportKvPage(9, Q, "b", [(KV, 0, 0xFFFFFFFF)]), errors.QuotaError),
    "a handle in use": (abi.ImportKvPage(9, Q, KV, "a"), errors.HandleError),
    "no such export": (abi.ImportKvPage(9, Q, 9, "A"), errors.NotFoundError),
    "a long name to import": (
        abi.ImportKvPage(9, Q, 9, "\U0001f600" * 65),
        errors.ArgumentError,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_commands_are_typed_errors_and_hold_nothing(
    controller: ControllerProcess, name: str
) -> None:
    command, error = WRONG[name]
    peer = ready(controller, PROMPT, 16)
    export(peer)
    assert refused(peer, command) is error
    assert isinstance(_error(peer, abi.Synchronize(10, Q)), error), "it stops its queue"
    assert peer.ask(abi.Synchronize(11, Q)) is None
    assert len(peer.ask(abi.ListExported(12))) == 1


def test_freed_pages_are_not_exported(controller: ControllerProcess) -> None:
    peer = ready(controller, PROMPT, 16)
    peer.ask(abi.DeallocKvPage(3, Q, KV, 0, 1))
    assert refused(peer, abi.ExportKvPage(4, Q, "a", [(KV, 0, 2)])) is errors.SpanError


def test_imports_count_as_the_importer_s_pages_and_handles(controller: ControllerProcess) -> None:
    exporter = ready(controller, PROMPT, 16)
    export(exporter)
    _, importer = controller.admit(kv_pages=5)
    importer.put(abi.CreateQueue(None, Q))
    for kv in (1, 2):
        assert importer.ask(abi.ImportKvPage(kv, Q, kv, "a")) == [2, b"meta"]
    assert refused(importer, abi.ImportKvPage(3, Q, 3, "a")) is errors.QuotaError
    _error(importer, abi.Synchronize(4, Q))
    importer.put(abi.DeallocKvPage(None, Q, 1))
    assert importer.ask(abi.ImportKvPage(5, Q, 3, "a")) == [2, b"meta"]


def test_the_cap_counts_what_is_exported_now(controller: ControllerProcess) -> None:
    peer = ready(controller, PROMPT, 16)
    export(peer)
    for i in range(40):
        peer.put(abi.ExportKvPage(None, Q, f"n{i}", [(KV, 0, 2)], bytes(60000)))
        peer.put(abi.UnexportKvPage(2, f"n{i}"))
        assert peer.wait(2) is None
    peer.put(*[abi.ExportKvPage(None, Q, f"n{i}", [(KV, 0, 2)]) for i in range(15)])
    assert refused(peer, abi.ExportKvPage(3, Q, "b", [(KV, 0, 1)])) is errors.QuotaError


def test_what_exports_keep_beside_pages_has_a_cap_too(controller: ControllerProcess) -> None:
    _, peer = controller.admit(export_pages=1000, user="u")
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(None, Q, KV, 1))
    for i in range(279):
        peer.put(abi.ExportKvPage(None, Q, f"x{i}", [(KV, 0, 1)], bytes(60000)))
    last = abi.ExportKvPage(1, Q, "y", [(KV, 0, 1)], bytes(60000))
    assert refused(peer, last) is errors.QuotaError
    _error(peer, abi.Synchronize(2, Q))
    assert peer.ask(abi.UnexportKvPage(3, "x0")) is None
    assert peer.ask(last) is None


def test_a_flood_of_lists_is_carried_out_in_turns_and_ends_who_does_not_read(
    controller: ControllerProcess,
) -> None:
    """4,000 lists of 250 names in one frame would be 60 MB of answers at once."""
    seat, peer = controller.admit(export_pages=300)
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(None, Q, KV, 1))
    peer.put(*[abi.ExportKvPage(None, Q, f"n{i}", [(KV, 0, 1)]) for i in range(250)])
    _, honest = controller.admit()
    peer.put(*[abi.ListExported(i) for i in range(4000)])
    assert controller.from_host(control.End).seat == seat
    assert controller.stats().seats[seat].message_bytes < 8 << 20
    honest.put(abi.CreateQueue(1, Q))
    assert honest.wait(1) is None


# --- how long -----------------------------------------------------------------


def test_an_export_without_a_lease_ends_with_its_exporter_one_with_a_lease_does_not(
    controller: ControllerProcess,
) -> None:
    seat, exporter = controller.admit()
    exporter.put(*setup(PROMPT, 16), abi.Synchronize(1, Q))
    controller.wait(exporter, 1)
    export(exporter, "a", lease=1000)
    export(exporter, "b")
    controller.release(seat)
    _, importer = controller.admit()
    ((name, pages, whose, left),) = importer.ask(abi.ListExported(1))
    assert (name, pages, whose) == ("a", 2, f"i{seat}") and 0 < left <= 1000
    assert go_on(controller, importer, PROMPT, 1) == greedy([*PROMPT, 7], 1, VOCAB)


def test_a_lease_that_is_over_frees_the_pages_by_itself(controller: ControllerProcess) -> None:
    """Also while nobody asks anything of the controller, and while the exporter lives."""
    exporter = ready(controller, PROMPT, 16)
    export(exporter, "a", lease=1)
    assert exporter.ask(abi.DeallocKvPage(3, Q, KV)) is None
    assert controller.stats().total.pages_free == PAGES - 2
    time.sleep(2.5)  # the next question finds it done: nothing else wakes the controller
    assert controller.stats().total.pages_free == PAGES
    assert refused(exporter, abi.ImportKvPage(4, Q, 9, "a")) is errors.NotFoundError
    assert exporter.ask(abi.ListExported(5)) == []


def test_an_import_renews_the_lease(controller: ControllerProcess) -> None:
    exporter = ready(controller, PROMPT, 16)
    export(exporter, "a", lease=600)
    while (left := exporter.ask(abi.ListExported(3))[0][3]) > 599.9:
        time.sleep(0.02)
    exporter.put(abi.ImportKvPage(4, Q, 9, "a"), abi.ListExported(5))
    assert exporter.wait(4) == [2, b"meta"]
    assert left < exporter.wait(5)[0][3] <= 600


# --- when pages run out -------------------------------------------------------


def test_exports_of_the_dead_go_first_the_nearest_to_its_end_before_others(
    controller: ControllerProcess,
) -> None:
    seat, exporter = controller.admit()
    exporter.put(*setup(PROMPT, 16), abi.Synchronize(1, Q))
    controller.wait(exporter, 1)
    for name, lease in (("a", 2000), ("b", 1000), ("c", 3000)):
        kv = {"a": 21, "b": 22, "c": 23}[name]
        exporter.put(abi.AllocKvPage(None, Q, kv, 10))
        exporter.put(abi.ExportKvPage(2, Q, name, [(kv, 0, 10)], b"", lease))
        controller.wait(exporter, 2)
    living = ready(controller, PROMPT, 16)
    living.put(abi.AllocKvPage(None, Q, 21, 10))
    living.put(abi.ExportKvPage(2, Q, "d", [(21, 0, 1)], b"", 10))
    assert controller.wait(living, 2) is None
    controller.release(seat)
    assert controller.stats().total.pages_free == PAGES - 42
    for pages, left in ((23, ["a", "c", "d"]), (10, ["c", "d"]), (10, ["d"])):
        _, peer = controller.admit()
        peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, pages))
        assert controller.wait(peer, 1) is None
        assert [entry[0] for entry in living.ask(abi.ListExported(9))] == left
    settle(controller)
    assert not [m for m in controller.inbox if isinstance(m, control.End)], "nobody had to end"
    living.ask(abi.UnexportKvPage(10, "d"))


def test_then_the_newest_goes_even_if_only_its_exports_hold_pages(
    controller: ControllerProcess,
) -> None:
    _, old = controller.admit()
    middle, _ = controller.admit()
    exporter = ready(controller, PROMPT, 16)
    exporter.put(abi.AllocKvPage(None, Q, 2, 30))
    exporter.put(abi.ExportKvPage(2, Q, "a", [(2, 0, 30)], b"", 1000))
    assert controller.wait(exporter, 2) is None
    exporter.put(abi.DeallocKvPage(None, Q, 2), abi.DeallocKvPage(3, Q, KV))
    assert controller.wait(exporter, 3) is None
    old.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 60))
    end = controller.from_host(control.End)
    assert (end.seat, end.code) == (middle + 1, "out_of_memory")
    assert controller.wait(old, 1) is None
    assert old.ask(abi.ListExported(2)) == [], "its export with a lease went as the dead's do"


def test_a_lease_as_long_as_can_be_ends_nobody(controller: ControllerProcess) -> None:
    peer = ready(controller, PROMPT, 16)
    export(peer, lease=0xFFFFFFFF)
    ((name, pages, _, left),) = peer.ask(abi.ListExported(3))
    assert (name, pages) == ("a", 2) and left > 0xFFFFFF00
    settle(controller)


def test_a_flood_of_imports_does_not_pile_up_what_is_answered(
    controller: ControllerProcess,
) -> None:
    """Each answer has the whole `meta`; those of one frame would be 60 MB."""
    _, peer = controller.admit()
    peer.put(
        abi.CreateQueue(None, Q),
        abi.AllocKvPage(None, Q, KV, 1),
        abi.ExportKvPage(1, Q, "a", [(KV, 0, 1)], bytes(60000)),
    )
    peer.wait(1)
    n = 1000
    for _ in range(30):  # those without an answer do not count
        peer.put(abi.ImportKvPage(None, Q, SHARED, "a"), abi.DeallocKvPage(None, Q, SHARED))
    peer.put(
        *[
            command
            for i in range(n)
            for command in (
                abi.ImportKvPage(100 + i, Q, SHARED, "a"),
                abi.DeallocKvPage(None, Q, SHARED),
            )
        ]
    )
    answers = [_code(peer, 100 + i) for i in range(n)]
    worked = answers.index(errors.QuotaError.code)
    assert 8 <= worked <= 18  # a full MiB of them, less what others hold
    assert set(answers[:worked]) == {0} and set(answers[worked:]) == {errors.QuotaError.code}
    peer.put(abi.Synchronize(None, Q))
    assert peer.ask(abi.ImportKvPage(2000, Q, SHARED, "a"))[0] == 1


def _code(peer: Peer, request: int) -> int:
    try:
        peer.wait(request)
    except AnswerError as error:
        return error.code
    return 0
