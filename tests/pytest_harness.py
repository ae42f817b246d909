"""Runs pytest on a user's folder, as a user who has installed inferlet and piehost would."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from .host_harness import DEADLINE

ROOT = Path(__file__).resolve().parent.parent
SDK = ROOT / "bindings" / "python"


def install_plugin(site: Path) -> Path:
    """A folder for PYTHONPATH in which pytest finds the entry points of the SDK's pyproject.toml,
    whether or not the SDK is installed here."""
    info = site / "inferlet-0.1.0.dist-info"
    info.mkdir(parents=True)
    project = tomllib.loads((SDK / "pyproject.toml").read_text())["project"]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: inferlet\nVersion: 0.1.0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


def run_pytest(
    folder: Path, environment: dict[str, str], site: Path, *arguments: str, first: str = ""
) -> subprocess.CompletedProcess[str]:
    """`pytest ARGUMENTS` in `folder`. `first` goes to the front of its PYTHONPATH."""
    paths = [first, str(install_plugin(site)), str(ROOT), str(SDK)]
    # With these set pytest repeats every failure in its summary, uncut.
    on_ci = ("CI", "BUILD_NUMBER")
    user = {name: value for name, value in environment.items() if name not in on_ci}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**user, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
