"""Many Python inferlets starting while many run: the zygote must not mix up their descriptors."""

from __future__ import annotations

from pathlib import Path

from .sandbox_harness import LauncherProcess, Running


def test_a_crowd_starts_while_a_crowd_runs(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import os\nos.read(3, 1)\n")
    zygote = LauncherProcess("--preload")
    for _ in range(3):
        running: list[Running] = []
        for _ in range(4):
            running += [zygote.start(script, "python") for _ in range(16)]
            assert running[-16].spawned().pid  # the next ones start while these still do
        for inferlet in running:
            inferlet.socket.close()
        assert [inferlet.outcome().code for inferlet in running] == [0] * 64
    zygote.close()
