"""KV pages shared by name: for how long, and which exports go first when pages run out."""

from __future__ import annotations

import time

from inferlet import abi, errors

from piehost.wire import control

from . import controller_exporters
from .controller_answers import refused, settle
from .controller_exporters import PAGES, ready
from .controller_process import VOCAB, ControllerProcess
from .controller_programs import KV, PROMPT, Q, export, go_on, setup
from .toy_device import greedy

controller = controller_exporters.controller  # the fixture


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


def test_a_lease_as_long_as_can_be_ends_nobody(controller: ControllerProcess) -> None:
    peer = ready(controller, PROMPT, 16)
    export(peer, lease=0xFFFFFFFF)
    ((name, pages, _, left),) = peer.ask(abi.ListExported(3))
    assert (name, pages) == ("a", 2) and left > 0xFFFFFF00
    settle(controller)


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
