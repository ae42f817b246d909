"""Parents and children, as far as the controller: messages both ways, ends, and whose handle is
whose. The test is the host: it admits children and says when they have ended."""

from __future__ import annotations

from typing import Any

import pytest
from inferlet import abi, errors

from piehost.wire import control, services

from . import controller_fixtures
from .controller_answers import refused, settle
from .controller_process import ControllerProcess, Peer

shared, controller = controller_fixtures.shared, controller_fixtures.emptied  # the fixtures

CHILD = 7


def asked(controller: ControllerProcess, kind: type) -> Any:
    """The next `Ask` of that kind that reached the host; earlier ones of other kinds are lost."""
    while True:
        ask = controller.from_host(control.Ask)
        if isinstance(ask.call, kind):
            return ask


class Family:
    """A parent and its running child, `CHILD` to it."""

    def __init__(self, controller: ControllerProcess, handle: int = CHILD) -> None:
        self.controller = controller
        self.parent_seat, self.parent = controller.admit()
        self.ask, self.seat, self.child = spawn(controller, self.parent, self.parent_seat, handle)
        self.number = self.ask.call.child

    def end_child(self, code: int) -> None:
        """The child's process is dead; what it wrote last was read."""
        self.controller.release(self.seat)
        self.controller.host.send(control.ChildEnded(self.number, code))


def spawn(
    controller: ControllerProcess, parent: Peer, seat: int, handle: int
) -> tuple[Any, int, Peer]:
    request = parent.request()
    parent.put(abi.Spawn(request, handle, "helper", ["a", "b"]))
    ask = asked(controller, services.Spawn)
    assert ask.seat == seat and (ask.call.program, ask.call.args) == ("helper", ["a", "b"])
    child_seat, child = controller.admit(parent=seat, child=ask.call.child)
    controller.host.send(control.Reply(ask.request, f"i{child_seat}"))
    assert parent.wait(request) == f"i{child_seat}"
    return ask, child_seat, child


def to_child(peer: Peer, data: bytes, handle: int = CHILD) -> None:
    assert peer.ask(abi.SendChild(peer.request(), handle, data)) is None


def from_child(peer: Peer, handle: int = CHILD) -> bytes:
    data: bytes = peer.ask(abi.ReceiveChild(peer.request(), handle))
    return data


def receive(peer: Peer) -> bytes:
    data: bytes = peer.ask(abi.Receive(peer.request()))
    return data


def send(peer: Peer, data: bytes) -> None:
    assert peer.ask(abi.Send(peer.request(), data)) is None


# --- messages -----------------------------------------------------------------


def test_messages_pass_between_parent_and_child_in_order_and_not_to_the_host(
    controller: ControllerProcess,
) -> None:
    family = Family(controller)
    waiting = family.child.request()
    family.child.put(abi.Receive(waiting))
    settle(controller)
    for i in range(5):
        to_child(family.parent, b"down %d" % i)
        send(family.child, b"up %d" % i)
    assert family.child.wait(waiting) == b"down 0"
    assert [receive(family.child) for _ in range(4)] == [b"down %d" % i for i in range(1, 5)]
    assert [from_child(family.parent) for _ in range(5)] == [b"up %d" % i for i in range(5)]
    settle(controller)
    assert not [m for m in controller.inbox if isinstance(m, control.Sent | control.Taken)]


def test_what_is_sent_before_the_child_runs_waits_for_it(controller: ControllerProcess) -> None:
    seat, parent = controller.admit()
    parent.put(
        abi.Spawn(1, CHILD),
        abi.SendChild(2, CHILD, b"early"),
        abi.ReceiveChild(3, CHILD),
        abi.CloseChild(4, CHILD),
    )
    ask = asked(controller, services.Spawn)
    assert parent.wait(2) is None and parent.wait(4) is None
    _, child = controller.admit(parent=seat, child=ask.call.child)
    assert receive(child) == b"early"
    assert refused(child, abi.Receive(child.request())) is errors.ClosedError
    send(child, b"hello")
    assert parent.wait(3) == b"hello"
    controller.host.send(control.Reply(ask.request, "its id"))
    assert parent.wait(1) == "its id"
    assert refused(parent, abi.SendChild(parent.request(), CHILD, b"")) is errors.ClosedError


def test_a_grandchild_speaks_to_its_own_parent(controller: ControllerProcess) -> None:
    family = Family(controller)
    _, _, grandchild = spawn(controller, family.child, family.seat, CHILD)
    send(grandchild, b"up")
    assert from_child(family.child) == b"up"
    waiting = family.parent.request()
    family.parent.put(abi.ReceiveChild(waiting, CHILD))
    send(family.child, b"further up")
    assert family.parent.wait(waiting) == b"further up"


# --- ends ---------------------------------------------------------------------


def test_the_end_of_a_child_answers_all_who_wait_after_its_last_messages(
    controller: ControllerProcess,
) -> None:
    family = Family(controller)
    parent = family.parent
    parent.put(abi.WaitChild(901, CHILD), abi.WaitChild(902, CHILD))
    family.child.put(abi.Send(None, b"last"), abi.Send(None, b"words"))
    family.child.sock.close()
    family.end_child(3)
    assert parent.wait(901) == parent.wait(902) == 3
    assert parent.ask(abi.WaitChild(903, CHILD)) == 3, "also later"
    assert [from_child(parent), from_child(parent)] == [b"last", b"words"]
    assert refused(parent, abi.ReceiveChild(904, CHILD)) is errors.ClosedError
    assert refused(parent, abi.SendChild(905, CHILD, b"")) is errors.ClosedError
    assert parent.ask(abi.EndChild(906, CHILD)) is None
    assert refused(parent, abi.WaitChild(907, CHILD)) is errors.HandleError
    settle(controller)
    calls = [m.call for m in controller.inbox if isinstance(m, control.Ask)]
    assert not [c for c in calls if isinstance(c, services.EndChild)], "it was dead already"


def test_a_waiting_receive_child_is_closed_when_the_child_ends(
    controller: ControllerProcess,
) -> None:
    family = Family(controller)
    waiting = family.parent.request()
    family.parent.put(abi.ReceiveChild(waiting, CHILD))
    settle(controller)
    family.end_child(0)
    with pytest.raises(Exception, match=f"^{errors.ClosedError.code}:"):
        family.parent.wait(waiting)


def test_end_child_frees_the_handle_and_news_of_the_old_child_do_not_reach_the_new_one(
    controller: ControllerProcess,
) -> None:
    family = Family(controller)
    parent = family.parent
    waiting = [parent.request(), parent.request()]
    parent.put(
        abi.WaitChild(waiting[0], CHILD),
        abi.ReceiveChild(waiting[1], CHILD),
        abi.EndChild(None, CHILD),
    )
    for request in waiting:
        with pytest.raises(Exception, match=f"^{errors.ClosedError.code}:"):
            parent.wait(request)
    assert asked(controller, services.EndChild).call.child == family.number
    send(family.child, b"into the void")
    assert refused(family.child, abi.Receive(family.child.request())) is errors.ClosedError
    ask, _, _ = spawn(controller, parent, family.parent_seat, CHILD)
    assert ask.call.child != family.number
    family.end_child(9)
    settle(controller)
    late = parent.request()
    parent.put(abi.WaitChild(late, CHILD))
    settle(controller)
    controller.host.send(control.ChildEnded(ask.call.child, 4))
    assert parent.wait(late) == 4


def test_the_end_of_a_parent_closes_its_children_s_input(controller: ControllerProcess) -> None:
    family = Family(controller)
    waiting = family.child.request()
    family.child.put(abi.Receive(waiting))
    controller.release(family.parent_seat)
    with pytest.raises(Exception, match=f"^{errors.ClosedError.code}:"):
        family.child.wait(waiting)
    send(family.child, b"nobody hears it")
    controller.host.send(control.ChildEnded(family.number, 0))
    settle(controller)


def test_a_spawn_that_fails_frees_its_handle_and_tells_who_waits(
    controller: ControllerProcess,
) -> None:
    seat, parent = controller.admit()
    parent.put(
        abi.Spawn(1, CHILD, "absent"),
        abi.ReceiveChild(2, CHILD),
        abi.WaitChild(3, CHILD),
        abi.SendChild(4, CHILD, b"x"),
    )
    ask = asked(controller, services.Spawn)
    error = (errors.NotFoundError.code, "no child program `absent`", "name it in inferlet.toml")
    controller.host.send(control.Reply(ask.request, error=error))
    for request in (1, 2, 3):
        with pytest.raises(Exception, match=f"^{errors.NotFoundError.code}: no child program"):
            parent.wait(request)
    assert parent.wait(4) is None
    assert refused(parent, abi.SendChild(5, CHILD, b"x")) is errors.HandleError
    spawn(controller, parent, seat, CHILD)


# --- hostile ------------------------------------------------------------------


def test_forged_foreign_and_used_handles_are_one_error(controller: ControllerProcess) -> None:
    family = Family(controller)
    _, stranger = controller.admit()
    r = stranger.request()
    for command in (
        abi.SendChild(r, CHILD, b""),
        abi.ReceiveChild(r, CHILD),
        abi.CloseChild(r, CHILD),
        abi.WaitChild(r, CHILD),
        abi.EndChild(r, CHILD),
    ):
        assert refused(stranger, command) is errors.HandleError
    assert refused(family.parent, abi.Spawn(99, CHILD)) is errors.HandleError
    family.parent.put(abi.ReceiveChild(None, CHILD), abi.WaitChild(None, CHILD))
    send(family.child, b"kept")
    assert from_child(family.parent) == b"kept"


def test_a_child_that_sends_more_than_its_parent_reads_is_ended(
    controller: ControllerProcess,
) -> None:
    family = Family(controller)
    for _ in range(18):
        family.child.put(abi.Send(None, bytes(60000)))
    end = controller.from_host(control.End)
    assert (end.seat, end.code) == (family.seat, "over_quota")
    family.end_child(137)
    assert len(from_child(family.parent)) == 60000
    assert family.parent.ask(abi.WaitChild(900, CHILD)) == 137


def test_a_parent_that_sends_more_than_its_child_reads_is_told(
    controller: ControllerProcess,
) -> None:
    family = Family(controller)
    for _ in range(17):
        to_child(family.parent, bytes(60000))
    full = abi.SendChild(900, CHILD, bytes(60000))
    assert refused(family.parent, full) is errors.QuotaError
    receive(family.child)
    assert family.parent.ask(full) is None


def test_empty_messages_are_bounded_too(controller: ControllerProcess) -> None:
    family = Family(controller)
    family.child.put(*[abi.Send(None, b"")] * 4000)
    family.child.put(*[abi.Send(None, b"")] * 97)
    assert controller.from_host(control.End).seat == family.seat


def test_handles_of_dead_children_have_a_cap(controller: ControllerProcess) -> None:
    seat, parent = controller.admit()
    for handle in range(1, 65):
        ask, child_seat, _ = spawn(controller, parent, seat, handle)
        controller.release(child_seat)
        controller.host.send(control.ChildEnded(ask.call.child, 0))
    assert refused(parent, abi.Spawn(901, 65)) is errors.QuotaError
    assert parent.ask(abi.EndChild(902, 1)) is None
    spawn(controller, parent, seat, 65)


def test_what_dead_children_left_bounds_how_many_more_there_may_be(
    controller: ControllerProcess,
) -> None:
    seat, parent = controller.admit(children=100)
    for handle in (1, 2):
        ask, child_seat, child = spawn(controller, parent, seat, handle)
        for _ in range(10):
            send(child, bytes(60000))
        controller.release(child_seat)
        controller.host.send(control.ChildEnded(ask.call.child, 0))
    settle(controller)
    assert refused(parent, abi.Spawn(901, 3)) is errors.QuotaError
    assert [len(from_child(parent, 1)) for _ in range(10)] == [60000] * 10, "nothing is lost"
    spawn(controller, parent, seat, 3)
    assert [len(from_child(parent, 2)) for _ in range(10)] == [60000] * 10


def test_what_waits_from_children_that_live_stops_no_spawn(controller: ControllerProcess) -> None:
    seat, parent = controller.admit()
    for handle in (1, 2, 3):
        _, _, child = spawn(controller, parent, seat, handle)
        for _ in range(10):
            send(child, bytes(60000))
    spawn(controller, parent, seat, 4)


def test_a_parent_that_was_never_there_gives_a_child_without_input(
    controller: ControllerProcess,
) -> None:
    _, orphan = controller.admit(parent=999999, child=1)
    assert refused(orphan, abi.Receive(orphan.request())) is errors.ClosedError
    send(orphan, b"nobody hears it")
