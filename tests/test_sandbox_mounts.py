"""Mount namespaces: what is seen in them, that what is seen is current, what making one leaves."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from piehost.host.sandbox.layout import Place, plan
from piehost.host.sandbox.policy import syscalls

from .plain_user import USERS, under
from .sandbox_harness import LauncherProcess, compile_c, launcher, without

ATTACKERS = Path(__file__).parent / "attackers"
LOOK = """
import os, sys
def look(path):
    try: return oct(os.stat(path).st_mode)
    except OSError as error: return errno.errorcode[error.errno]
import errno
print(*map(look, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mounts")
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=USERS)
def zygote(request: pytest.FixtureRequest, folder: Path) -> Iterator[LauncherProcess]:
    with launcher("--preload", under=under(request.param, folder)) as process:
        yield process


@pytest.fixture(scope="module", params=USERS)
def native(request: pytest.FixtureRequest, folder: Path) -> Iterator[LauncherProcess]:
    with launcher(under=under(request.param, folder)) as process:
        yield process


def write(path: Path, text: str) -> Path:
    """As an editor does: a new file that takes the old one's place."""
    new = path.with_name(f"{path.name}~")
    new.write_text(text)
    new.chmod(0o644)
    new.rename(path)
    return path


def place(folder: Path, process: LauncherProcess) -> Path:
    """One for that launcher's tests alone."""
    made = folder / ("plain" if process.under else "root")
    made.mkdir(exist_ok=True)
    made.chmod(0o755)
    return made


# --- what is seen --------------------------------------------------------------------------------


def test_nothing_is_seen_but_what_is_granted(zygote: LauncherProcess, folder: Path) -> None:
    script = write(folder / "look.py", LOOK)
    own = folder / "look"
    own.mkdir(exist_ok=True)
    paths = ["/etc/passwd", "/proc", "/sys", "/home", "/root/.ssh", "/boot", str(folder / "other")]
    argv = [str(script), *paths, str(script), str(own), "/usr/lib", "/"]
    (folder / "other").touch()
    done = zygote.run(script, "python", argv=argv, readable=[str(script), str(own)])
    assert done.spawned is not None and not done.spawned.sees_all
    seen = done.out.split()
    assert seen[: len(paths)] == ["ENOENT"] * len(paths)
    assert seen[len(paths)] == "0o100644" and all(mode[:3] == "0o4" for mode in seen[-3:])
    assert seen[-1] == "0o40755"


def test_a_dynamic_program_sees_no_names_either(native: LauncherProcess, folder: Path) -> None:
    program = compile_c(ATTACKERS / "call.c", folder)
    stat = str(syscalls()["newfstatat"])
    seen = errno.EFAULT  # it is there, and there is nowhere to put what is known of it
    paths = {"/etc/passwd": errno.ENOENT, "/usr/lib": seen, str(program): seen}
    for path, code in paths.items():
        argv = ["call", stat, "-100", f"s:{path}", "8", "0"]
        assert native.run(program, argv=argv).out == f"{-code}\n"


@pytest.mark.parametrize("kind", ["native", "python"])
def test_all_that_is_seen_is_read_only(folder: Path, kind: str) -> None:
    path = ATTACKERS / "echo.py"
    if kind == "native":
        path = compile_c(ATTACKERS / "echo.c", folder)
    with launcher(*["--preload"] * (kind == "python")) as process:
        running = process.start(path, kind)
        mounts = Path(f"/proc/{running.spawned().pid}/mountinfo").read_text().splitlines()
        running.socket.close()
        assert running.outcome().code == 0
    points = {line.split()[4]: set(line.split()[5].split(",")) for line in mounts}
    assert {"/", str(path)} <= points.keys() and len(points) < 20
    assert all({"ro", "nosuid", "nodev"} <= options for options in points.values())


def test_links_lead_where_they_led(zygote: LauncherProcess, folder: Path) -> None:
    folder = place(folder, zygote)
    real = folder / "real"
    real.mkdir()
    write(real / "helper.py", "name = 'found'")
    (folder / "link").symlink_to("real")
    script = write(folder / "links.py", "import sys; import helper; print(helper.name)")
    text = f"import sys; sys.path.insert(0, {str(folder / 'link')!r})\n" + script.read_text()
    write(script, text)
    readable = [str(script), str(folder / "link")]
    assert zygote.run(script, "python", readable=readable).out == "found\n"


# --- it is current -------------------------------------------------------------------------------


def test_a_file_that_is_replaced_is_seen_anew(zygote: LauncherProcess, folder: Path) -> None:
    """The namespace is kept from launch to launch, with what was bound into it."""
    script = folder / "edited.py"
    for number in range(4):
        write(script, f"print({number})")
        assert zygote.run(script, "python").out == f"{number}\n"


def test_a_folder_is_seen_as_it_is(zygote: LauncherProcess, folder: Path) -> None:
    folder = place(folder, zygote)
    own = folder / "project"
    own.mkdir()
    script = write(own / "main.py", "import part; print(part.number)")
    changes = {"readable": [str(own)], "cwd": str(own)}
    for number in range(3):
        write(own / "part.py", f"number = {number}")
        assert zygote.run(script, "python", **changes).out == f"{number}\n"
    own.rename(folder / "moved")
    own.mkdir()
    write(script, "print('another folder')")
    assert zygote.run(script, "python", **changes).out == "another folder\n"


# --- what it leaves ------------------------------------------------------------------------------


def descriptors(process: LauncherProcess, most: int) -> int:
    """How many the launcher holds, once they are not more than `most`."""
    deadline = time.monotonic() + 10
    while (count := len(os.listdir(f"/proc/{process.process.pid}/fd"))) > most:
        assert time.monotonic() < deadline, f"{count} descriptors, not {most}"
        time.sleep(0.01)
    return count


def test_namespaces_are_kept_up_to_a_number(folder: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    scripts = [write(folder / f"one-of-many-{n}.py", f"print({n})") for n in range(8)]
    first = "import piehost.host.sandbox.mounts as m\nm._MOST = 3"
    with launcher("--preload", first=first) as process:
        assert process.run(scripts[0], "python").out == "0\n"
        before = descriptors(process, 1000)
        for number in (*range(8), 0, 7):
            assert process.run(scripts[number], "python").out == f"{number}\n"
        assert before < descriptors(process, before + 2)
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_what_cannot_be_put_together_is_refused_unless_waived(
    native: LauncherProcess, folder: Path
) -> None:
    program = compile_c(ATTACKERS / "call.c", folder, "-static")
    loop = folder / "loop"
    loop.unlink(missing_ok=True)
    loop.symlink_to("loop")
    before = descriptors(native, 1000)
    failed = native.run(program, readable=[str(loop)]).failed
    assert failed is not None and failed.stage == "mounts" and failed.errno == errno.ELOOP
    assert "--allow-degraded=mounts" in failed.hint
    assert descriptors(native, before) <= before


def test_where_none_can_be_made_inferlets_run_without(folder: Path) -> None:
    script = write(folder / "without.py", LOOK)
    with launcher("--preload", first=without("mount")) as process:
        changes = {"argv": [str(script), "/etc/passwd"], "waived": ["identity"]}
        done = process.run(script, "python", **changes)
        assert done.out.startswith("0o100") and done.spawned is not None and done.spawned.sees_all


# --- plans ---------------------------------------------------------------------------------------


def test_a_plan_holds_what_leads_to_its_paths(tmp_path: Path) -> None:
    base = str(tmp_path)
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "one").symlink_to("a")
    (tmp_path / "two").symlink_to(f"{base}/one/b/../file")
    (tmp_path / "a/b/inside").symlink_to("/nowhere")
    layout = plan(
        [f"{base}/two", f"{base}/a/b", f"{base}/a/b/c", f"{base}/a/b/inside", f"{base}/none"],
        [f"{base}/a", "/dev/null/x", "/"],
    )
    assert layout.places == [
        Place(f"{base}/a/b", True, False),
        Place(f"{base}/a/file", False, False),
    ]
    assert layout.links == [(f"{base}/one", "a"), (f"{base}/two", f"{base}/one/b/../file")]
    above = [str(path) for path in reversed(tmp_path.parents) if path != Path("/")]
    assert layout.folders == [*above, base, f"{base}/a"]


def test_a_device_keeps_its_use() -> None:
    assert plan(["/dev/urandom"]).places == [Place("/dev/urandom", False, True)]


def test_what_leads_nowhere_or_in_circles(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as caught:
        plan([str(tmp_path / "loop")])
    assert caught.value.errno == errno.ELOOP
    (tmp_path / "up").symlink_to("../" * 40)
    assert plan([str(tmp_path / "up")]).places == [Place("/", True, False)]
    assert plan(["/no/such/path"], ["/no/such/folder"]).places == []
