"""`piehost doctor`: proves each control of the sandbox by trying what it stops."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import TYPE_CHECKING, Any, Final

import click

from .show import show_json, show_table

if TYPE_CHECKING:
    from ..sandbox.probe import Check

_NO_CONTROL: Final = 1  # exit code: a control is missing


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Prove what the sandbox stops, by trying it; show what this machine has.

    Exits with 1 if a control is missing that inferlets are not started without.
    """
    from ..sandbox.probe import probe

    facts = _facts()
    checks = [*probe(), _control_groups()]
    if as_json:
        show_json({"machine": facts, "controls": checks})
    else:
        show_table(("MACHINE", ""), [(name, str(value)) for name, value in facts.items()])
        click.echo()
        show_table(
            ("CONTROL", "STOPS", "ATTEMPTED", "GOT", ""),
            [(c.name, c.stops, c.attempted, c.got, "ok" if c.ok else "MISSING") for c in checks],
        )
        _explain([check for check in checks if not check.ok])
    if not all(check.ok for check in checks if check.required):
        click.get_current_context().exit(_NO_CONTROL)


def _control_groups() -> Check:
    from ..cgroups import Missing, detect
    from ..sandbox.probe import Check

    groups = detect(lambda act: None)
    stops, attempted = "using all memory and processors", "pass the limits of a group"
    if isinstance(groups, Missing):
        return Check(
            "cgroup",
            stops,
            attempted,
            groups.why,
            ok=False,
            cost="memory is limited as address space only, and a quota of cpu is refused",
            hint=groups.hint,
            required=False,
        )
    groups.close()
    return Check("cgroup", stops, attempted, "held back", ok=True, required=False)


def _explain(missing: list[Check]) -> None:
    for check in missing:
        click.echo(f"\n{check.name} is missing: {check.cost}")
        if not check.required:
            click.echo("  inferlets are started without it")
        click.echo(f"  try: {check.hint}")


def _facts() -> dict[str, Any]:
    import torch  # takes seconds, and only it knows the device

    from ..sandbox.kernel import landlock_abi

    try:
        landlock = f"ABI {landlock_abi()}"
    except OSError as error:
        landlock = f"none ({error.strerror})"
    cuda = torch.cuda.is_available()
    flashinfer = importlib.util.find_spec("flashinfer") is not None
    return {
        "piehost": _version("piehost"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "engine": "flashinfer" if cuda and flashinfer else "torch",
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "landlock": landlock,
        "server": _server(),
    }


def _server() -> str:
    """Whether the server at the usual socket is well."""
    from ..client import connect
    from ..errors import HostError

    try:
        with connect() as client:
            children = client.stats().children
    except HostError as error:
        return "none runs" if error.reason.code == "no_server" else f"UNWELL: {error.reason.what}"
    return f"well; its processes: {', '.join(sorted(children))}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
