"""Bindings that are sound but for one defect each: what each function here says.

The name of the defect is the program's argument; tests/test_conform.py knows the rule it breaks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from raw import (
    ALLOC_EMB,
    ALLOC_KV,
    CHAT,
    CREATE_QUEUE,
    DEALLOC_EMB,
    DIST,
    EMBED,
    HIDDEN,
    PRIORITY,
    PROMPT,
    QUESTION,
    QUEUE,
    RECEIVE,
    SAMPLE,
    SEND,
    SYNCHRONIZE,
    TOKENIZE,
    Binding,
    Failed,
)

DEFECTS: dict[str, Callable[[], None]] = {}
_KNOWN_KEYS = {"abi", "version", "id", "user", "job", "deadline", "args", "models", "limits"}
_LAST_CODE = 18


def defect(program: Callable[[], None]) -> Callable[[], None]:
    DEFECTS[program.__name__] = program
    return program


@defect
def none() -> None:
    Binding().whole()


# --- what it sends --------------------------------------------------------------------------


@defect
def sets_the_more_bit() -> None:
    class Bad(Binding):
        def framed(self, body: bytes) -> bytes:
            return b"\x01" + super().framed(body)[1:]

    Bad().short()


@defect
def leaves_half_a_frame() -> None:
    binding = Binding()
    binding.short()
    binding.write(binding.framed(bytes(100))[:40])


@defect
def adds_an_octet() -> None:
    class Bad(Binding):
        def framed(self, body: bytes) -> bytes:
            return super().framed(body + b"\x00")

    Bad().short()


@defect
def fills_frames_too_much() -> None:
    binding = Binding()
    binding.ask(CREATE_QUEUE, QUEUE)
    for _ in range(4097):
        binding.tell(PRIORITY, QUEUE, 0)
    binding.short()


@defect
def invents_an_op() -> None:
    Binding().ask(99, 1)


@defect
def sends_text_for_octets() -> None:
    Binding().ask(SEND, "text")


@defect
def adds_a_field() -> None:
    Binding().ask(TOKENIZE, 0, PROMPT, True, 0)


@defect
def counts_requests_in_64_bits() -> None:
    class Bad(Binding):
        def new_request(self) -> int:
            return self.requests + (1 << 32)

    Bad().short()


@defect
def has_one_request_id() -> None:
    class Bad(Binding):
        def new_request(self) -> int:
            return 1

    binding = Bad()
    binding.post(TOKENIZE, 0, PROMPT)
    with contextlib.suppress(Failed):
        binding.ask(CHAT, 0, QUESTION)


@defect
def calls_what_kills() -> None:
    ctypes.CDLL(None).ptrace(0, 0, 0, 0)


@defect
def ends_with_a_code() -> None:
    Binding().short()
    sys.exit(3)


# --- handles, queues, rings -----------------------------------------------------------------


@defect
def counts_handles_from_0() -> None:
    Binding().ask(CREATE_QUEUE, 0)


@defect
def makes_a_handle_twice() -> None:
    binding = Binding()
    binding.tell(CREATE_QUEUE, QUEUE)
    binding.tell(ALLOC_EMB, QUEUE, 1, 1)
    binding.tell(ALLOC_EMB, QUEUE, 1, 1)
    binding.say(binding.attempt(SYNCHRONIZE, QUEUE))


@defect
def uses_what_it_freed() -> None:
    binding = Binding()
    binding.tell(CREATE_QUEUE, QUEUE)
    binding.tell(ALLOC_EMB, QUEUE, 1, 1)
    binding.tell(DEALLOC_EMB, QUEUE, 1)
    binding.tell(EMBED, QUEUE, [1, 0], [5])
    binding.say(binding.attempt(SYNCHRONIZE, QUEUE))


@defect
def takes_one_kind_for_another() -> None:
    binding = Binding()
    binding.tell(CREATE_QUEUE, QUEUE)
    binding.tell(ALLOC_KV, QUEUE, 7, 1)
    binding.say(binding.attempt(EMBED, QUEUE, [7, 0], [5]))


@defect
def embeds_a_token_before_it_is_sampled() -> None:
    binding = Binding()
    binding.tell(CREATE_QUEUE, QUEUE)
    binding.tell(ALLOC_EMB, QUEUE, 1, 1)
    binding.say(binding.attempt(EMBED, QUEUE, [1, 0], [~9]))


@defect
def goes_on_after_errors() -> None:
    binding = Binding()
    binding.tell(CREATE_QUEUE, QUEUE)
    binding.say([binding.attempt(ALLOC_KV, QUEUE, 1 + i, 1 << 30) for i in range(6)])


@defect
def has_odd_offsets() -> None:
    binding = Binding()
    binding.prefill()
    binding.attempt(DIST, QUEUE, [HIDDEN, 0], 4, 2)
    binding.say(binding.attempt(SYNCHRONIZE, QUEUE))


@defect
def believes_in_a_larger_ring() -> None:
    binding = Binding()
    binding.prefill()
    binding.attempt(DIST, QUEUE, [HIDDEN, 0], 4, binding.limits["ring_bytes"])
    binding.say(binding.attempt(SYNCHRONIZE, QUEUE))


@defect
def has_one_place_for_all() -> None:
    binding = Binding()
    with contextlib.suppress(Failed):
        binding.prefill()
        requests = [binding.post(DIST, QUEUE, [HIDDEN, 0], 4, 16 * i) for i in range(3)]
        for request in requests:
            binding.wait(request)
    binding.attempt(SYNCHRONIZE, QUEUE)


@defect
def puts_masks_outside() -> None:
    binding = Binding()
    binding.prefill()
    at = binding.limits["ring_in_bytes"] - 1
    binding.attempt(SAMPLE, QUEUE, [HIDDEN, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False, at)
    binding.say(binding.attempt(SYNCHRONIZE, QUEUE))


@defect
def writes_masks_anew() -> None:
    """While those before are still needed: behind a chain that takes its time."""
    binding = Binding()
    with contextlib.suppress(Failed):
        binding.prefill()
        binding.chain(50)
        masked: list[Any] = [[HIDDEN, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False, 0]
        requests = []
        for octet in (0x55, 0xAA):
            binding.allow(octet)
            requests.append(binding.post(SAMPLE, QUEUE, *masked))
            binding.ask(CHAT, 0, QUESTION)  # so that the frame has arrived
        for request in requests:
            binding.wait(request)
    binding.attempt(SYNCHRONIZE, QUEUE)


# --- what it is told ------------------------------------------------------------------------


@defect
def takes_a_read_for_a_frame() -> None:
    class Bad(Binding):
        def take(self, data: bytes) -> None:
            super().take(data)
            if self.arrived:
                sys.exit(4)

    Bad().short()


@defect
def takes_answers_in_the_order_it_asked() -> None:
    class Bad(Binding):
        def answered(self, body: bytes) -> None:
            for kind, request, *rest in msgspec.msgpack.decode(body):
                own = asked.pop(0) if asked else request
                self.answers[own] = (None, Failed(*rest)) if kind else (rest[0], None)

    binding = Bad()
    requests = [binding.post(TOKENIZE, 0, PROMPT), binding.post(CHAT, 0, QUESTION)]
    asked = list(requests)
    for request in requests:
        with contextlib.suppress(Failed):
            binding.say(binding.wait(request))


@defect
def knows_short_forms_only() -> None:
    class Bad(Binding):
        def answered(self, body: bytes) -> None:
            if not 0x90 <= body[0] <= 0x9F:
                sys.exit(5)
            super().answered(body)

    Bad().short()


@defect
def refuses_new_keys() -> None:
    class Bad(Binding):
        def read_startup(self, block: bytes) -> Any:
            startup = super().read_startup(block)
            if set(startup) != _KNOWN_KEYS:
                sys.exit(6)
            return startup

    Bad().short()


@defect
def crashes_with_small_limits() -> None:
    binding = Binding()
    if binding.limits["kv_pages"] < 16:
        os.abort()
    binding.short()


@defect
def waits_for_ever_after_errors() -> None:
    class Bad(Binding):
        def answered(self, body: bytes) -> None:
            # of one code alone: conform has to try them all
            good = [a for a in msgspec.msgpack.decode(body) if not a[0] or a[2] != _LAST_CODE]
            super().answered(msgspec.msgpack.encode(good))

    Bad().short()


@defect
def crashes_of_unknown_codes() -> None:
    class Bad(Binding):
        def failed(self, code: int, message: str, hint: str) -> Failed:
            if code > _LAST_CODE:
                os.abort()
            return super().failed(code, message, hint)

    Bad().short()


@defect
def receives_without_end() -> None:
    binding = Binding()
    binding.say([binding.attempt(RECEIVE) for _ in range(30)])


@defect
def never_reads() -> None:
    binding = Binding()
    for _ in range(10_000):  # it is ended long before
        binding.post(TOKENIZE, 0, "a b c d " * 250)
        binding.flush()


@defect
def ends_happily_when_cut_off() -> None:
    class Bad(Binding):
        def at_end(self) -> None:
            sys.exit(0)

    Bad().short()


@defect
def spins_when_cut_off() -> None:
    class Bad(Binding):
        def at_end(self) -> None:
            """Reads again, and again."""

    Bad().short()


DEFECTS[msgspec.msgpack.decode(os.pread(6, 1 << 20, 0))["args"][0]]()
