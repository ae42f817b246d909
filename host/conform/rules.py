"""The rules of docs/abi.md that an inferlet can break, and how each is checked.

docs/conformance.md lists them; a test keeps it equal to this table.
"""

from __future__ import annotations

from typing import Final

from . import ring_rules, stream_rules, weather_rules
from .handle_rules import FRESH, LIVE, RANGE, SAMPLED, handles
from .runs import Run
from .stream_rules import no_fault
from .verdicts import FAIR, Rule, Verdict, each
from .weather_rules import as_plain

RULES: Final = [
    Rule(
        "system-calls",
        "1",
        "It makes no system call that its profile forbids.",
        each(stream_rules.makes_allowed_calls),
    ),
    Rule(
        "frame-header",
        "2",
        "A frame begins with 00 and one octet of size, or 02 and eight; its body is no larger than "
        "65,536 octets.",
        each(no_fault("frame-header")),
    ),
    Rule(
        "frame-whole",
        "2",
        "The program does not end in the middle of a frame.",
        each(stream_rules.whole_frames),
    ),
    Rule(
        "frame-body",
        "2",
        "A body is one msgpack array, and nothing follows it.",
        each(no_fault("frame-body")),
    ),
    Rule(
        "frame-commands",
        "2",
        "A frame holds at most 4,096 commands.",
        each(no_fault("frame-commands")),
    ),
    Rule(
        "command-op",
        "2, 8",
        "A command is an array that begins with the number of one of the commands.",
        each(no_fault("command-op")),
    ),
    Rule(
        "command-fields",
        "2, 8",
        "A command has the fields of its op, of their types and in their ranges, and no others.",
        each(no_fault("command-fields")),
    ),
    Rule(
        "request-id",
        "2",
        "A request id is an unsigned 32-bit number, or nil.",
        each(no_fault("request-id")),
    ),
    Rule(
        "request-unique",
        "2",
        "A request id is not used again before its answer has come.",
        each(stream_rules.unique_requests),
    ),
    Rule(
        "answers-split",
        "2",
        "Answers that come octet by octet are the same answers.",
        as_plain("octets", weather_rules.has_answers),
    ),
    Rule(
        "answers-late",
        "2",
        "Answers that come late, many frames in one piece, are the same answers.",
        as_plain("late", weather_rules.has_answers),
    ),
    Rule(
        "answers-order",
        "2",
        "Answers of different queues, and of commands without a queue, may come in any order.",
        as_plain("reordered", weather_rules.has_other_order),
    ),
    Rule(
        "answers-forms",
        "2",
        "Values may come in any form that msgpack has for them, and an integer for a float.",
        as_plain("wide", weather_rules.has_answers),
    ),
    Rule(
        "startup-keys",
        "3",
        "Keys of the start-up block that it does not know are ignored.",
        as_plain("keys", weather_rules.always),
    ),
    Rule(
        "startup-limits",
        "3",
        "With the smallest limits it ends by itself: it neither crashes nor hangs.",
        each(weather_rules.survives_limits, ["limits"]),
    ),
    Rule(
        RANGE,
        "5",
        "Handles are from 1 to 4,294,967,295.",
        each(no_fault(RANGE)),
    ),
    Rule(
        FRESH,
        "5",
        "Nothing is made under a handle that is in use.",
        each(handles(FRESH), FAIR),
    ),
    Rule(
        LIVE,
        "5",
        "A handle is used only while what it stands for, of that kind, is there.",
        each(handles(LIVE), FAIR),
    ),
    Rule(
        SAMPLED,
        "5",
        "A late-bound token is referred to only after the `sample` that makes it was sent.",
        each(handles(SAMPLED), FAIR),
    ),
    Rule(
        "queue-errors",
        "5",
        "After an error a queue is used again only after a `synchronize`.",
        each(stream_rules.synchronizes, ["error", "late", "reordered"]),
    ),
    Rule(
        "ring-out-inside",
        "8",
        "Places in ring out lie in it, at a multiple of 4.",
        each(ring_rules.out_inside),
    ),
    Rule(
        "ring-out-free",
        "8",
        "A place in ring out is not named again before the answer.",
        each(ring_rules.out_free),
    ),
    Rule(
        "ring-in-inside",
        "8",
        "Places in ring in lie in it.",
        each(ring_rules.in_inside),
    ),
    Rule(
        "ring-in-still",
        "8",
        "Octets in ring in are left alone until the answer.",
        each(ring_rules.in_still),
    ),
    Rule(
        "receive-closed",
        "8",
        "After `closed`, it stops to receive.",
        each(stream_rules.ends_on_closed),
    ),
    Rule(
        "errors-taken",
        "9",
        "An error answer, with whatever code of the table, neither crashes it nor lets it hang.",
        each(weather_rules.survives(unknown=False), ["error"]),
    ),
    Rule(
        "errors-unknown",
        "9",
        "Nor does an error with a code that is not in the table.",
        each(weather_rules.survives(unknown=True), ["error"]),
    ),
    Rule(
        "answers-read",
        "10",
        "It reads its answers: no more than 6 MiB of them ever waits.",
        each(stream_rules.reads_answers),
    ),
    Rule(
        "connection-lost",
        "1",
        "When its connection is closed it ends by itself, and not with exit code 0.",
        each(weather_rules.ends_with_connection, ["cut"]),
    ),
    Rule(
        "exit-code",
        "1",
        "Where nothing goes wrong, it ends by itself with exit code 0.",
        each(weather_rules.ends_well, ["plain"]),
    ),
]


def judge(runs: list[Run]) -> dict[str, Verdict]:
    """What the runs say about each rule, by its id."""
    verdicts = {}
    for rule in RULES:
        verdict = Verdict()
        rule.check(runs, verdict)
        verdicts[rule.id] = verdict
    return verdicts
