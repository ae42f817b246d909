"""What `piehost conform` prints."""

from __future__ import annotations

import textwrap
from typing import Any, Final

from .rules import RULES
from .runs import Run
from .verdicts import Verdict

_SHOWN: Final = 3  # evidence of each broken rule
_WIDTH: Final = 96


def as_text(verdicts: dict[str, Verdict], runs: list[Run]) -> str:
    """A line a rule, with what proves that it was broken below, and a count at the end."""
    width = max(len(rule.id) for rule in RULES)
    lines = []
    for rule in RULES:
        verdict = verdicts[rule.id]
        head = f"{verdict.state:<13}  {rule.id:<{width}}  "
        lines += textwrap.wrap(head + rule.text, _WIDTH, subsequent_indent=" " * len(head))
        for evidence in verdict.broken[:_SHOWN]:
            where = f", {evidence.where}" if evidence.where else ""
            lines.append(f"    in weather {evidence.weather}{where}: {evidence.what}")
        if len(verdict.broken) > _SHOWN:
            lines.append(f"    and {len(verdict.broken) - _SHOWN} times more")
    states = [verdict.state for verdict in verdicts.values()]
    counts = [f"{states.count(state)} {state}" for state in ("kept", "broken", "not exercised")]
    lines.append(f"{len(RULES)} rules: {', '.join(counts)}; {len(runs)} runs")
    return "\n".join(lines)


def as_json(verdicts: dict[str, Verdict], runs: list[Run], passed: bool) -> dict[str, Any]:
    """The same as one document. Messages that are no UTF-8 have U+FFFD for what is not."""
    return {
        "passed": passed,
        "rules": [
            {
                "id": rule.id,
                "section": rule.section,
                "text": rule.text,
                "state": verdicts[rule.id].state,
                "evidence": verdicts[rule.id].broken,
            }
            for rule in RULES
        ],
        "runs": [
            {
                "weather": run.weather,
                "code": run.code,
                "reason": run.reason,
                "frames": run.frames,
                "commands": len(run.sent()),
                "messages": [message.decode(errors="replace") for message in run.messages],
            }
            for run in runs
        ],
    }
