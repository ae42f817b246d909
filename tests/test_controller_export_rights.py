"""KV pages shared by name: who may export, import and write, and how much of it."""

from __future__ import annotations

import pytest
from inferlet import abi, errors

from piehost.wire import control

from . import controller_exporters
from .controller_answers import refused
from .controller_exporters import ready
from .controller_process import AnswerError, ControllerProcess, Peer
from .controller_programs import KV, PROMPT, SHARED, Q, export

controller = controller_exporters.controller  # the fixture


def _error(peer: Peer, command: abi.Command) -> errors.InferletError:
    with pytest.raises(AnswerError) as caught:
        peer.ask(command)
    error = caught.value
    return errors.from_answer(error.code, error.message, error.hint)


# --- who may ------------------------------------------------------------------


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


# --- how much -----------------------------------------------------------------


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
