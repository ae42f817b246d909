"""The measurements: each returns plain numbers, several samples of each."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from piehost.host.client import Client
from piehost.wire import client as wire

from .bare import BareLoop
from .served import messages


def spread(samples: list[float]) -> dict[str, float]:
    """Median with minimum and maximum."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": len(samples),
    }


def served_decode(
    client: Client, program: Path, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """`batch` inferlets at once: TPOT (s, median over inferlets) and tokens/s over all of them."""
    arguments = ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    runs = [client.launch(program, arguments) for _ in range(batch)]
    for run in runs:
        messages(run, 1)
    before = client.stats().controller
    for run in runs:
        run.send(b"go")
    results = [run.result(timeout=600) for run in runs]
    after = client.stats().controller
    clocks = [[float(x) for x in result.text.split()] for result in results]
    stats = [result.stats for result in results]
    tokens = sum(s.tokens_out for s in stats)
    return {
        "tpot": statistics.median((last - first) / (new_tokens - 1) for _, first, last in clocks),
        "tokens_per_second": batch
        * new_tokens
        / (max(last for *_, last in clocks) - min(start for start, *_ in clocks)),
        # a check: no token can take less than its step keeps the backend busy (prefill included)
        "backend_seconds_per_step": (after.backend_seconds - before.backend_seconds)
        / (after.steps - before.steps),
        "mean_batch": sum(s.batch_sum for s in stats) / max(1, sum(s.steps for s in stats)),
        "messages_per_token": sum(s.frames_in + s.frames_out for s in stats) / tokens,
    }


def bare_decode(
    loop: BareLoop, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """The same work in the bare loop."""
    start = time.monotonic()
    stamps = loop.decode(batch, prompt_tokens, new_tokens)
    return {
        "tpot": (stamps[-1] - stamps[0]) / (new_tokens - 1),
        "tokens_per_second": batch * new_tokens / (stamps[-1] - start),
    }


def decode(
    client: Client,
    loop: BareLoop,
    programs: dict[str, Path],
    batches: list[int],
    repeats: int,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
) -> list[dict[str, Any]]:
    """Bare loop and inferlets in turn, so that the machine's moods hit all alike."""
    rows = []
    for batch in batches:
        samples: dict[str, list[dict[str, float]]] = {"bare": [], **{k: [] for k in programs}}
        for repeat in range(repeats + 1):  # the first is a warm-up
            measured = {"bare": bare_decode(loop, batch, prompt_tokens, new_tokens)}
            for language, program in programs.items():
                measured[language] = served_decode(
                    client, program, batch, prompt_tokens, new_tokens
                )
            if repeat:
                for name, sample in measured.items():
                    samples[name].append(sample)
        row: dict[str, Any] = {"inferlets": batch}
        for name, taken in samples.items():
            row[name] = {key: spread([s[key] for s in taken]) for key in taken[0]}
            if name != "bare":
                ratios = [
                    s["tpot"] / b["tpot"] for s, b in zip(taken, samples["bare"], strict=True)
                ]
                row[name]["tpot_over_bare"] = spread(ratios)
        rows.append(row)
    return rows


def launches(client: Client, program: Path, count: int) -> dict[str, float]:
    """Client's launch to the inferlet's first message, seconds; one at a time."""
    taken = []
    for _ in range(count):
        start = time.monotonic()
        run = client.launch(program)
        messages(run, 1)
        taken.append(time.monotonic() - start)
        for event in run.events():
            if isinstance(event, wire.Ended):
                break
    return spread(taken)


def calls(client: Client, program: Path, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds a control call: waiting for each, and all in as few frames as possible.

    `count` is at most 1,000: the C binding keeps 1,024 answers.
    """
    alone, together = [], []
    for _ in range(repeats):
        result = client.launch(program, ["--count", str(count)]).result(timeout=600)
        if result.code != 0:
            raise SystemExit(f"{program} failed: {result.stderr.decode()}{result.reason}")
        first, second = (float(x) * 1e-6 for x in result.text.split())
        alone.append(first)
        together.append(second)
    return {"round_trip": spread(alone), "amortised": spread(together)}
