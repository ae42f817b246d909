"""What is hidden, evicted or behind a window: who sees it, and whose pages are free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from inferlet import ArgumentError, Context, abi
from inferlet.errors import BackendError
from scripted import Host
from scripted_device import MAX_CONTEXT, next_token

PROMPT = list(range(40))


def seen(tokens: Sequence[int], hidden: Sequence[int]) -> int:
    """The token after `tokens`, the last of which sees all before it but `hidden`."""
    last = len(tokens) - 1
    return next_token(tuple((i, t) for i, t in enumerate(tokens) if i == last or i not in hidden))


def after(context: Context) -> int:
    """The next token, which does not stay."""
    token = next(context.generate_tokens(1))
    context.rewind(1)
    return token


def test_a_masked_token_is_not_seen_and_can_be_shown_again(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        context.mask(3, 9)
        context.mask(20, 21)
        assert context.hidden == [(3, 9), (20, 21)]
        assert after(context) == seen(PROMPT, [*range(3, 9), 20])
        context.mask(4, 20, visible=True)
        assert context.hidden == [(3, 4), (20, 21)]
        assert after(context) == seen(PROMPT, [3, 20])
        assert context.tokens == PROMPT


def test_all_hidden_leaves_the_token_itself(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        context.mask(0, len(PROMPT))
        assert after(context) == seen(PROMPT, range(len(PROMPT) - 1))
        context.fill([7, 8])
        assert after(context) == seen([*PROMPT, 7, 8], range(len(PROMPT)))


def test_a_mask_on_shared_pages_changes_no_fork(host: Host) -> None:
    with host.model.context(PROMPT) as context, context.fork() as fork:
        fork.mask(2, 12)
        assert after(fork) == seen(PROMPT, range(2, 12))
        assert after(context) == seen(PROMPT, [])
    assert not host.controller.of(abi.MaskKvPage)


def test_a_fork_hides_what_its_parent_hid(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        context.mask(2, 12)
        context.evict(16, 32)
        with context.fork() as fork:
            context.mask(2, 12, visible=True)
            assert fork.hidden == [(2, 12), (16, 32)]
            assert after(fork) == seen(PROMPT, [*range(2, 12), *range(16, 32)])


def test_evicting_frees_the_pages_it_covers(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        after(context)
        host.settle()
        before = host.controller.pages_held
        context.evict(5, 30)  # pages 1 and 2 wholly, parts of 0 and 3
        host.settle()
        assert before - host.controller.pages_held == 2
        context.evict(30, 32)  # page 3 is covered by both together
        host.settle()
        assert before - host.controller.pages_held == 3
        assert after(context) == seen(PROMPT, range(5, 32))
        with pytest.raises(ArgumentError, match="tokens 10 to 11 were evicted"):
            context.mask(10, 12, visible=True)
        context.mask(10, 10, visible=True)  # none of them


def test_a_page_trimmed_into_after_it_was_evicted_is_made_anew(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        after(context)
        context.evict(8, 24)
        context.trim(12)
        assert context.hidden == [(8, 12)]
        context.fill([9, 9, 9])
        expected = [*PROMPT[:12], 9, 9, 9]
        assert after(context) == seen(expected, range(8, 12))
        assert after(context) == seen(expected, range(8, 12)), "and once more"


def test_the_last_token_can_be_evicted_and_is_computed_all_the_same(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        context.evict(0, len(PROMPT))
        assert after(context) == seen(PROMPT, range(len(PROMPT) - 1))
        context.fill([1])
        assert after(context) == seen([*PROMPT, 1], range(len(PROMPT)))


def test_an_evicted_page_stays_while_the_last_token_is_in_it(host: Host) -> None:
    prompt = list(range(64))
    with host.model.context(prompt) as context:
        after(context)
        context.fill(range(8))
        context.mask(0, 0)  # all but the last is computed, and a page more is reserved behind it
        context.evict(64, 72)
        tokens = [*prompt, *range(8)]
        assert after(context) == seen(tokens, range(64, 71))
        context.fill([5])
        assert after(context) == seen([*tokens, 5], range(64, 72))


def windowed(tokens: Sequence[int], count: int, sink: int, recent: int) -> list[int]:
    """Greedy tokens, of which each sees the first `sink` and the `recent` before it."""
    made = list(tokens)
    for _ in range(count):
        last = len(made) - 1
        gone = range(sink, last - recent) if last >= len(tokens) else []
        made.append(seen(made, gone))
    return made[len(tokens) :]


@pytest.mark.parametrize(("sink", "recent"), [(4, 16), (0, 1), (9, 30), (100, 5), (3, 400)])
def test_a_window_is_what_generated_tokens_see(host: Host, sink: int, recent: int) -> None:
    with host.model.context(PROMPT) as context:
        context.window(sink, recent)
        assert list(context.generate_tokens(120)) == windowed(PROMPT, 120, sink, recent)
        gone = len(context) - 1 - recent
        assert context.hidden == ([(sink, gone)] if gone > sink else [])


def test_a_window_bounds_memory(make_host: Callable[..., Host]) -> None:
    host = make_host(kv_pages=14)
    with host.model.context(PROMPT) as context:
        context.window(4, 16)
        # 20 tokens and the page at either end, and at most a chain and a half ahead
        tokens = list(context.generate_tokens(MAX_CONTEXT - len(PROMPT)))
        assert tokens == windowed(PROMPT, len(tokens), 4, 16)
        assert len(context) == MAX_CONTEXT
        host.settle()
        assert host.controller.pages_held <= 14


def test_a_window_survives_leaving_early_and_filling(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        context.window(2, 10)
        stream = context.generate_tokens(200)
        taken = [next(stream) for _ in range(50)]
        assert taken == windowed(PROMPT, 50, 2, 10)
        context.fill([1, 2, 3])
        length = len(PROMPT) + 50
        assert context.hidden == [(2, length - 11)]
        # what is filled in sees all that is left
        assert after(context) == seen(context.tokens, range(2, length - 11))


def test_after_a_failure_what_was_evicted_stays_away(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        context.evict(8, 24)
        context.mask(30, 32)
        after(context)
        host.controller.fail_next = (abi.Forward, BackendError("the step failed", "try again"))
        with pytest.raises(BackendError):
            next(context.generate_tokens(5))
        assert after(context) == seen(PROMPT, [*range(8, 24), 30, 31])
        # computed again with a mask, because hidden inputs are among them
        assert sum(f.mask is not None for f in host.controller.of(abi.Forward)) == 1
        host.settle()
        assert host.controller.pages_held == 5 - 2
        context.mask(30, 32, visible=True)
        assert after(context) == seen(PROMPT, range(8, 24))


def test_wrong_ranges_are_refused_and_change_nothing(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        for first, end in ((0, 41), (5, 4), (-1, 3), (41, 41)):
            for change in (context.mask, context.evict):
                with pytest.raises(ArgumentError, match="out of range"):
                    change(first, end)
        with pytest.raises(ArgumentError, match="of type str"):
            context.mask("a", 3)  # type: ignore[arg-type]
        for sink, recent in ((-1, 5), (0, 0), (0, MAX_CONTEXT + 1)):
            with pytest.raises(ArgumentError, match="out of range"):
                context.window(sink, recent)
        with pytest.raises(ArgumentError, match="keep"):
            context.trim(41)
        with pytest.raises(ArgumentError, match="take away"):
            context.rewind(41)
        assert context.hidden == [] and len(context) == 40
        assert after(context) == seen(PROMPT, [])


def test_more_hidden_ranges_than_a_forward_reads_are_refused() -> None:
    host = Host()
    host.runtime.startup.models[0].max_context = 3000
    with host.model.context([1] * 1100) as context:
        for at in range(0, 1000, 2):
            context.mask(at, at + 1)
        with pytest.raises(ArgumentError, match="number of hidden ranges is 501"):
            context.mask(1010, 1011)
        context.mask(1, 2)  # closes a gap
        assert after(context) == seen([1] * 1100, [1, *range(0, 1000, 2)])
    host.close()
