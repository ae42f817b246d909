"""Writes docs/cli.md from every verb's `--help` and the table of quotas; a test keeps it fresh.

python scripts/write_cli_docs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from piehost.host.cli import piehost
from piehost.host.quotas import QUOTAS

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_WIDTH: Final = 96

_HEAD: Final = """\
# The command line

Written by `scripts/write_cli_docs.py` from each verb's `--help`; do not edit it by hand.

Exit codes:

| code | when |
|---|---|
| the inferlet's own | it ended by itself |
| 1 | `conform`: a rule is broken; `doctor`: a control is missing; `replay`: something differs |
| 2 | wrong usage, of `--quota` too |
| 125 | piehost itself failed |
| 126 | the program is refused: it cannot run here |
| 127 | there is no such program or inferlet |
| 128 + n | signal n ended it: the inferlet, or `piehost launch` (130 is Ctrl-C) |

Errors go to stderr and say what happened, why, and what to try. `--json` prints one document on
stdout. `NO_COLOR` is respected; progress is shown on a terminal only. `PIEHOST_SOCKET` names a
server's socket as `--socket` does; without either it is `host.sock` in the run directory,
`$XDG_RUNTIME_DIR/piehost` or `/tmp/piehost-UID`. `--debug` may stand behind the verb too.
"""

_MANIFEST: Final = """\
## inferlet.toml

A folder is launched as its inferlet.toml says. All but `entry` may be left out:

```toml
entry = "main.py"          # what runs: a file of the folder
name = "agent"             # what its ids begin with; else the folder's name
description = "Answers"    # for people
kind = "python"            # or node, perl, native; else the suffix or the #! line says it

[quota]                    # as --quota, which wins
kv_pages = 64

[children]                 # what it may spawn, by name: files of the folder
helper = "helper.py"
```

The inferlet may read all of the folder, which is its working directory, and nothing else of yours.
"""


def page() -> str:
    """What docs/cli.md has to be."""
    context = click.Context(
        piehost, info_name="piehost", terminal_width=_WIDTH, **piehost.context_settings
    )
    parts = [_HEAD, _block(piehost, context)]
    parts += _verbs(piehost, context)
    parts += ["## Quotas\n", _quotas(), _MANIFEST]
    return "\n".join(parts)


def _verbs(group: click.Group, context: click.Context) -> list[str]:
    """A section for each, those of groups within groups too."""
    parts = []
    for name in group.list_commands(context):
        verb = group.get_command(context, name)
        assert verb is not None
        inner = click.Context(verb, context, info_name=name, terminal_width=_WIDTH)
        parts += [f"## {inner.command_path}\n", _block(verb, inner)]
        if isinstance(verb, click.Group):
            parts += _verbs(verb, inner)
    return parts


def _block(command: click.Command, context: click.Context) -> str:
    return f"```\n{command.get_help(context)}\n```\n"


def _quotas() -> str:
    lines = [
        "For `--quota KEY=VALUE`, `piehost quota set`, and the tables `quota` of inferlet.toml and",
        "piehost.toml. Numbers may have a unit: k, M, G, KiB, MiB or GiB; `cpu` a %. The launch's",
        "win over those of inferlet.toml, which win over the defaults; what the operator gives",
        "(piehost.toml, `piehost serve --quota`) is default and ceiling of both.",
        "[operations.md](operations.md) says more. *none*: it can be `none`, and is by default.",
        "*fixed*: `piehost quota set` cannot change it.",
        "",
        "| key | means | from | to | | beyond it |",
        "|---|---|---|---|---|---|",
    ]
    for key, known in QUOTAS.items():
        marks = ["none"] * known.may_be_none + ["fixed"] * bool(known.fixed)
        bounds = f"{known.low:,} | {known.high:,} | {', '.join(marks)}"
        lines.append(f"| {key} | {known.meaning} | {bounds} | {known.beyond} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
