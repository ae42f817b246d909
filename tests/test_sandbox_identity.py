"""Own users: what they keep apart, how they are handed out, what is said where there are none."""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from piehost.host.sandbox.identity import POOLS, Uids
from piehost.wire.launch import Rlimits, SpawnFailed

from .plain_user import PLAIN_USER, USERS, under
from .sandbox_harness import LauncherProcess, Running, compile_c, launcher, without

ATTACKERS = Path(__file__).parent / "attackers"
KINDS = ["native", "python"]
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root gives user ids away")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def programs(folder: Path) -> dict[str, Path]:
    return {
        name: compile_c(ATTACKERS / f"{name}.c", folder, "-static")
        for name in ("echo", "apart", "threads", "call")
    }


@pytest.fixture(params=USERS)
def user(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def native(user: str, folder: Path) -> Iterator[LauncherProcess]:
    with launcher(under=under(user, folder)) as process:
        yield process


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def end(*inferlets: Running) -> None:
    for inferlet in inferlets:
        inferlet.socket.close()
        inferlet.outcome()


def refusal(process: LauncherProcess, path: Path, kind: str = "native", **changes) -> SpawnFailed:  # type: ignore[no-untyped-def]
    failed = process.run(path, kind, **changes).failed
    assert failed is not None
    return failed


# --- what it keeps apart -------------------------------------------------------------------------


@root_only
@pytest.mark.parametrize("kind", KINDS)
def test_root_gives_each_a_user_of_its_own(programs: dict[str, Path], kind: str) -> None:
    path = programs["echo"] if kind == "native" else ATTACKERS / "echo.py"
    with launcher(*["--preload"] * (kind == "python")) as process:
        crowd = [process.start(path, kind) for _ in range(8)]
        pids = [inferlet.spawned().pid for inferlet in crowd]
        owners = []
        for pid in pids:
            fields = status(pid)
            assert len({*fields["Uid"].split(), *fields["Gid"].split()}) == 1
            assert fields["Groups"].split() == []
            owners.append(int(fields["Uid"].split()[0]))
        assert len(set(owners)) == 8
        assert any(set(owners) <= set(pool) for pool in POOLS)
        end(*crowd)


def test_a_plain_user_gives_each_a_namespace_of_its_own(
    programs: dict[str, Path], folder: Path
) -> None:
    with launcher(under=under("plain", folder)) as process:
        crowd = [process.start(programs["echo"]) for _ in range(4)]
        pids = [inferlet.spawned().pid for inferlet in crowd]
        spaces = {Path(f"/proc/{pid}/ns/user").stat().st_ino for pid in pids}
        assert len(spaces) == 4 and Path("/proc/self/ns/user").stat().st_ino not in spaces
        assert {Path(f"/proc/{pid}/uid_map").read_text() for pid in pids} == {""}
        owner = os.getuid() or PLAIN_USER
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} <= {owner, 0}
        end(*crowd)


def test_it_holds_without_seccomp_and_landlock(
    programs: dict[str, Path], folder: Path, user: str
) -> None:
    """A sibling cannot be traced or read, nothing can be mounted, no right comes back."""
    missing = without("seccomp", "landlock_create_ruleset")
    waived = ["seccomp", "landlock"]
    with launcher(first=missing, under=under(user, folder)) as process:
        sibling = process.start(programs["echo"], waived=waived)
        pid = str(sibling.spawned().pid)
        argv = [str(programs["apart"]), pid]
        out = process.run(programs["apart"], argv=argv, waived=waived).out
        end(sibling)
    got = {name: int(code) for name, code in (line.split() for line in out.splitlines())}
    assert len(got) == 8
    if user == "plain":
        del got["kill"]  # the same user, as far as signals go: seccomp and Landlock keep them
        assert got.pop("setuid") == errno.EINVAL  # there is no user 0 in its namespace
    assert set(got.values()) == {errno.EPERM}


@pytest.mark.parametrize("count", [2, 24])
def test_threads_are_counted_for_each(
    native: LauncherProcess, programs: dict[str, Path], count: int
) -> None:
    """Each gets its number, whatever its siblings and the user's other processes have."""
    limits = Rlimits(address_space=2 << 30, open_files=64, file_size=0, threads=count)
    crowd = [native.start(programs["threads"], limits=limits) for _ in range(4)]
    for inferlet in crowd:
        inferlet.spawned()
        assert int(inferlet.socket.recv(100)) == count
    end(*crowd)


def test_processes_are_counted_too(programs: dict[str, Path], folder: Path, user: str) -> None:
    """Where seccomp does not stop a fork, the number of processes is limited still."""
    script = folder / "forks.py"
    script.write_text(
        "import os, time\n"
        "count = 1\n"
        "try:\n"
        "    while count < 200:\n"
        "        if os.fork() == 0: time.sleep(60); os._exit(0)\n"
        "        count += 1\n"
        "except BlockingIOError: pass\n"
        "print(count, flush=True)\n"
        "os.kill(0, 9)\n"
    )
    limits = Rlimits(address_space=2 << 30, open_files=64, file_size=0, threads=10)
    missing = without("seccomp")
    with launcher("--preload", first=missing, under=under(user, folder)) as process:
        assert process.run(script, "python", limits=limits, waived=["seccomp"]).out == "10\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["link", "kill"])
def test_death_with_the_launcher_outlives_the_change_of_user(
    programs: dict[str, Path], folder: Path, user: str, kind: str, how: str
) -> None:
    preload = ["--preload"] * (kind == "python")
    process = LauncherProcess(*preload, under=under(user, folder))
    inferlet = process.start(programs["echo"] if kind == "native" else ATTACKERS / "echo.py", kind)
    pidfd = os.pidfd_open(inferlet.spawned().pid)
    if how == "link":
        process.close()
    else:
        process.process.kill()
        process.process.wait()
        process.link.close()
    ended, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    assert ended, "it outlives its launcher"


# --- how ids are handed out ----------------------------------------------------------------------


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> range:
    """Four ids that no launcher hands out, nor another test, here or in a run beside this one."""
    first = POOLS[0][-1] + 1 + 64 * (os.getpid() % 256) + 4 * (hash(request.node.name) % 16)
    return range(first, first + 4)


@root_only
def test_two_hosts_never_share_an_id(pool: range) -> None:
    one, other = Uids(pool), Uids(pool)
    taken = [one.claim(), other.claim(), one.claim(), other.claim()]
    assert set(taken) == set(pool)
    for uids in (one, other):
        with pytest.raises(OSError) as caught:
            uids.claim()
        assert caught.value.errno == errno.EAGAIN
    one.release(taken[0])
    assert other.claim() == taken[0]


@root_only
def test_an_id_is_not_given_away_while_a_process_has_it(pool: range) -> None:
    uids = Uids(pool[:1])
    uid = uids.claim()
    pid = os.fork()
    if pid == 0:
        os.setresuid(uid, uid, uid)
        signal.pause()
    try:
        while Path(f"/proc/{pid}").stat().st_uid != uid:
            pass
        uids.release(uid)
        with pytest.raises(OSError, match="are taken"):
            uids.claim()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(OSError, match="are taken"):  # it is dead, but not gone
            uids.claim()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert uids.claim() == uid


@root_only
def test_the_pool_bounds_inferlets_and_is_refilled(programs: dict[str, Path], pool: range) -> None:
    first = f"import piehost.host.sandbox.identity as i\ni.POOLS = (range({pool[0]}, {pool[2]}),)"
    with launcher(first=first) as process:
        for _ in range(2):
            running = [process.start(programs["echo"]) for _ in range(2)]
            assert all(inferlet.spawned() for inferlet in running)
            failed = refusal(process, programs["echo"])
            assert failed.stage == "identity" and failed.errno == errno.EAGAIN
            assert process.run(programs["echo"], cwd="/nowhere").failed is not None
            end(*running)
            for _ in range(3):  # a launch that fails gives its own back
                assert refusal(process, programs["echo"], cwd="/nowhere").stage == "chdir"


# --- where there are none, and what they cannot read ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_it_a_launch_is_refused_unless_that_is_waived(
    programs: dict[str, Path], folder: Path, user: str, kind: str
) -> None:
    path = programs["call"] if kind == "native" else ATTACKERS / "call.py"
    missing = without("setresuid", "unshare")
    preload = ["--preload"] * (kind == "python")
    changes = {"argv": [str(path), "102"]}  # getuid
    with launcher(*preload, first=missing, under=under(user, folder)) as process:
        failed = refusal(process, path, kind, **changes)
        assert failed.stage == "identity" and "--allow-degraded=identity" in failed.hint
        if kind == "python":
            changes["waived"] = ["identity"]
            owner = os.getuid() or PLAIN_USER * (user == "plain")
            assert process.run(path, kind, **changes).out == f"{owner}\n"


@root_only
@pytest.mark.parametrize("mode", [0o600, 0o700])
def test_root_may_grant_what_is_closed_to_others(tmp_path: Path, mode: int) -> None:
    """The grants decide, not the modes; what is not granted stays shut."""
    (tmp_path / "helper.py").write_text("name = 'helped'")
    script = tmp_path / "main.py"
    script.write_text(
        "import os, helper\n"
        "print(helper.name, os.getuid() > 0)\n"
        "for path in ('/', '/etc/shadow', '../x'):\n"
        "    try: print(os.open(path, 0))\n"
        "    except OSError as error: print(error.errno in (2, 13))\n"
    )
    for path in (script, tmp_path / "helper.py"):
        path.chmod(mode)
    tmp_path.chmod(0o700)
    changes = {"readable": [str(tmp_path)], "cwd": str(tmp_path)}
    with launcher("--preload") as process:
        out = process.run(script, "python", **changes).out
        assert out.split() == ["helped", *["True"] * 4]
    for control, call in (("landlock", "landlock_create_ruleset"), ("seccomp", "seccomp")):
        with launcher("--preload", first=without(call)) as process:
            failed = refusal(process, script, "python", waived=[control], **changes)
            assert failed.stage == "identity" and failed.errno == errno.EACCES
            assert "chmod" in failed.hint and str(tmp_path) in failed.message
            waived = [control, "identity"]
            assert "helped" in process.run(script, "python", waived=waived, **changes).out


@root_only
@pytest.mark.parametrize("option", ["-static", "-no-pie"])
def test_a_closed_program_has_at_most_the_right_to_read(tmp_path: Path, option: str) -> None:
    program = compile_c(ATTACKERS / "echo.c", tmp_path, option)
    program.chmod(0o700)
    with launcher() as process:
        running = process.start(program)
        running.socket.send(b"x")
        assert running.socket.recv(10) == b"x"
        fields = status(running.spawned().pid)
        held = {int(fields[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Inh", "Amb")}
        assert held == ({0} if option == "-static" else {1 << 2})  # CAP_DAC_READ_SEARCH
        assert int(fields["Uid"].split()[0]) > 0
        end(running)
