"""Scripts of other languages: which interpreter runs them is ours to say, and it is held."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from piehost.host import programs
from piehost.host.errors import Refused
from piehost.host.sandbox import interpreters

from .host_harness import Server, write_program
from .hostile.calls import ATTACKS, NR, N
from .interpreter_marks import needs_node, needs_perl
from .plain_user import USERS, under
from .sandbox_harness import ENVIRONMENT, LauncherProcess, launcher
from .test_sandbox_escape import ATTACKERS, unexpected

INFERLETS = Path(__file__).parent.parent / "inferlets"


EACH = [pytest.param("node", marks=needs_node), pytest.param("perl", marks=needs_perl)]


def run(server: Server, path: Path, *arguments: str, check: int = 0) -> str:
    return server.terminal.run("launch", path, "--", *arguments, check=check).stdout.decode()


def refusal(server: Server, path: Path) -> str:
    done = server.terminal.run("launch", path, check=126)
    assert b"Traceback" not in done.stderr and b"try:" in done.stderr
    return done.stderr.decode()


# --- inferlets written from docs/abi.md alone --------------------------------------------------


@pytest.mark.parametrize("language", EACH)
@pytest.mark.parametrize(
    ("prompt", "most"),
    [
        ("The capital of France is", 40),
        ("Grüße aus Köln, 日本", 1),
        ("Write a list of five animals:", 60),
        ("Paris is the capital of France. " * 80, 5),  # more tokens than are embedded at once
    ],
)
def test_an_inferlet_in_another_language_gives_the_same_text(
    server: Server, language: str, prompt: str, most: int
) -> None:
    arguments = ("--prompt", prompt, "--max-tokens", str(most))
    text = run(server, INFERLETS / language / "text_completion", *arguments)
    assert text.strip() and text == run(server, INFERLETS / "text_completion", *arguments)


@pytest.mark.parametrize("language", EACH)
def test_an_inferlet_in_another_language_queues_steps_ahead(server: Server, language: str) -> None:
    """A token takes four commands. More of them in a frame than that, even if each answer comes by
    itself, is possible only before the tokens are known."""
    path = INFERLETS / language / "text_completion"
    arguments = ("--prompt", "Write a list of five animals:", "--max-tokens", "60")
    done = server.terminal.run("launch", "--json", path, "--", *arguments, check=0)
    stats = json.loads(done.stdout)["stats"]
    assert stats["tokens_out"] > 16
    assert stats["commands"] > 6 * stats["frames_in"]


@pytest.mark.parametrize("language", EACH)
def test_an_inferlet_in_another_language_says_what_failed(server: Server, language: str) -> None:
    path = INFERLETS / language / "text_completion"
    assert len((path / programs.resolve(str(path)).path).read_text().splitlines()) < 150
    arguments = ("--quota", "kv_pages=1", "--", "--prompt", "The capital of France is")
    done = server.terminal.run("launch", path, *arguments, check=1)
    assert done.stderr.startswith(b"error: ") and b"try: " in done.stderr
    assert server.terminal.run("launch", path, "--", "--nonsense").returncode in (1, 2)


# --- which interpreter -------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize(
    "line", ["#!/usr/bin/env node", "#! /usr/bin/nodejs", "#!./node", "#!{folder}/node\r"]
)
def test_a_line_names_an_interpreter_and_the_host_says_where_it_is(
    server: Server, tmp_path: Path, line: str
) -> None:
    write_program(tmp_path, "node", "#!/bin/sh\necho fake\n").chmod(0o755)
    source = f"{line.format(folder=tmp_path)}\nconsole.log(process.execPath)\n"
    (tmp_path / "main").write_text(source)
    (tmp_path / "inferlet.toml").write_text('entry = "main"\n')
    assert run(server, tmp_path) == interpreters.locate("node") + "\n"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param(
            "main.js", "console.log(require('path').sep === '/' && 'ran')", marks=needs_node
        ),
        pytest.param("main.mjs", "import 'node:fs'; console.log('ran')", marks=needs_node),
        pytest.param("main.pl", "print qq(ran\\n)", marks=needs_perl),
        pytest.param("main", "#!/usr/bin/perl\nprint qq(ran\\n)", marks=needs_perl),
        ("main", "#!/usr/bin/env python3\nprint('ran')"),
        pytest.param("--version", "#!/usr/bin/env node\nconsole.log('ran')", marks=needs_node),
        pytest.param("-e", "#!/usr/bin/perl\nprint qq(ran\\n)", marks=needs_perl),
    ],
)
def test_a_script_is_known_by_its_suffix_or_line(
    server: Server, tmp_path: Path, name: str, source: str
) -> None:
    (tmp_path / name).write_text(source)
    assert run(server, tmp_path / name, "--version") == "ran\n"


@needs_perl
def test_a_manifest_may_name_the_interpreter(server: Server, tmp_path: Path) -> None:
    (tmp_path / "main.txt").write_text("require './part.pm'; print qq(@ARGV $ENV{LANG}\\n)")
    (tmp_path / "part.pm").write_text("1;")
    (tmp_path / "inferlet.toml").write_text('entry = "main.txt"\nkind = "perl"\n')
    assert run(server, tmp_path, "-e", "x y") == "-e x y C.UTF-8\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("#!/usr/bin/node --require=./evil.js", "gives options to node"),
        ("#!/usr/bin/env -S node --no-jitless", "gives options to env"),
        ("#!/usr/bin/env NODE_OPTIONS=--no-jitless node", "gives options to env"),
        ("#!/usr/bin/perl -e1", "gives options to perl"),
        ("#!/bin/sh", "'sh', which runs no inferlets"),
        ("#!/usr/bin/awk -f", "'awk', which runs no inferlets"),
        ("#!{folder}/evil", "'evil', which runs no inferlets"),
        ("#!", "'nothing', which runs no inferlets"),
        ("#!\xff\x00\x1b[31m", "runs no inferlets"),
    ],
)
def test_a_line_chooses_neither_options_nor_programs(
    server: Server, tmp_path: Path, line: str, says: str
) -> None:
    write_program(tmp_path, "evil", "#!/bin/sh\necho escaped\n").chmod(0o755)
    path = tmp_path / "script"
    path.write_text(line.format(folder=tmp_path) + "\nprint 1;\n")
    path.chmod(0o755)
    assert says in refusal(server, path)


@pytest.mark.parametrize(
    ("manifest", "name", "says"),
    [
        ('kind = "perl"', "main", "names node, but it is given as perl"),
        ('kind = "native"', "main", "names node, but it is given as native"),
        ("", "main.pl", "names node, but it is given as perl"),
        ('kind = "jit"', "main", "kind 'jit'"),
        ('kind = "/usr/bin/env"', "main", "is unknown"),
        ('kind = "node"\noptions = ["--no-jitless"]', "main", "options"),
    ],
)
def test_a_manifest_gives_no_weaker_profile(
    server: Server, tmp_path: Path, manifest: str, name: str, says: str
) -> None:
    (tmp_path / name).write_text("#!/usr/bin/env node\nconsole.log(1)\n")
    (tmp_path / "inferlet.toml").write_text(f'entry = "{name}"\n{manifest}\n')
    assert says in refusal(server, tmp_path)


def test_a_missing_interpreter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "_FOLDERS", (str(tmp_path),))
    script = write_program(tmp_path, "main.js", "console.log(1)")
    with pytest.raises(Refused) as caught:
        programs.resolve(str(script))
    assert "there is no node on this machine" in caught.value.reason.what
    assert "apt install nodejs" in caught.value.reason.hint


# --- hostile scripts ---------------------------------------------------------------------------

NODE_ESCAPES = """
const fs = require('fs'), net = require('net'), { spawnSync } = require('child_process');
const got = {};
const attempt = (name, act) => {
  try { got[name] = act() ?? 'done'; } catch (error) { got[name] = error.code ?? error.message; }
};
attempt('spawn', () => spawnSync('/bin/true').error.code);
attempt('kill', () => process.kill(1, 9));
attempt('write', () => fs.writeFileSync('/tmp/piehost-escaped', 'x'));
attempt('write here', () => fs.writeFileSync(__filename, 'x'));
attempt('mkdir', () => fs.mkdirSync('/tmp/piehost-escaped'));
attempt('read', () => fs.readFileSync('/etc/passwd'));
attempt('environ', () => fs.readFileSync('/proc/self/environ'));
attempt('setuid', () => process.setuid(65534));
attempt('wasm', () => typeof WebAssembly);
attempt('options', () => process.env.NODE_OPTIONS ?? 'none');
const sockets = {
  tcp: net.connect(80, '127.0.0.1'), unix: net.connect('/tmp/socket'), listen: net.createServer(),
  udp: require('dgram').createSocket('udp4'),
};
for (const [name, socket] of Object.entries(sockets))
  socket.on('error', (error) => { got[name] = error.code; });
sockets.listen.listen(0);
sockets.udp.bind(0);
setTimeout(() => { console.log(JSON.stringify(got)); process.exit(); }, 300);
"""

PERL_ESCAPES = r"""
use strict; use warnings; no warnings 'exec';
my %got;
sub attempt { my ($name, $act) = @_; $! = 0; $got{$name} = $act->() ? 'done' : 0 + $! }
attempt('fork', sub { defined fork });
attempt('system', sub { system('/bin/true') == 0 });
attempt('backticks', sub { defined `/bin/echo x` });
attempt('exec', sub { exec {'/bin/true'} '/bin/true' });
attempt('pipe to a program', sub { open my $f, '-|', '/bin/echo', 'x' });
attempt('socket', sub { socket my $s, 2, 1, 0 });
attempt('write', sub { open my $f, '>', '/tmp/piehost-escaped' });
attempt('read', sub { open my $f, '<', '/etc/passwd' });
attempt('unlink', sub { unlink $0 });
attempt('kill', sub { kill 9, 1 });
print join(',', map { "$_=$got{$_}" } sort keys %got), "\n";
"""


@needs_node
def test_a_hostile_node_script_is_refused(server: Server, tmp_path: Path) -> None:
    script = write_program(tmp_path, "escapes.js", NODE_ESCAPES)
    got = json.loads(run(server, script))
    assert got.pop("wasm") == "undefined" and got.pop("options") == "none"
    # hidden by a mount namespace, or shut by Landlock
    assert {got.pop(name) for name in ("read", "environ")} <= {"ENOENT", "EACCES"}
    assert len(got) == 10 and set(got.values()) == {"EPERM"}, got
    assert not Path("/tmp/piehost-escaped").exists()


@needs_perl
def test_a_hostile_perl_script_is_refused(server: Server, tmp_path: Path) -> None:
    script = write_program(tmp_path, "escapes.pl", PERL_ESCAPES)
    got = dict(pair.split("=") for pair in run(server, script).strip().split(","))
    assert got.pop("read") in (str(errno.ENOENT), str(errno.EACCES))  # hidden, or shut
    assert got.pop("exec") == str(errno.ENOSYS)
    assert len(got) == 8 and set(got.values()) == {str(errno.EPERM)}, got
    assert not Path("/tmp/piehost-escaped").exists()


@needs_perl
def test_a_forbidden_call_of_a_script_is_reported_by_name(server: Server, tmp_path: Path) -> None:
    script = write_program(tmp_path, "traces.pl", f"syscall({NR['ptrace']}, 16, 1, 0, 0)")
    done = server.terminal.run("launch", script, check=128 + signal.SIGSYS)
    assert b"killed by the sandbox: ptrace" in done.stderr


@needs_node
def test_a_script_that_switches_the_compiler_on_harms_itself_alone(
    server: Server, tmp_path: Path
) -> None:
    """The option is only a request to Node; what keeps memory from being both is the policy."""
    source = """
        require('v8').setFlagsFromString('--no-jitless');
        require('v8').setFlagsFromString('--always-sparkplug');
        const f = (n) => { let a = 0; for (let i = 0; i < n; i++) a = (a * 31 + i) | 0; return a; };
        f(10);
        console.log('compiled');
    """
    done = server.terminal.run("launch", write_program(tmp_path, "jit.js", source))
    assert done.returncode > 128 and b"compiled" not in done.stdout


# --- the same attacks as on executables, made from inside the interpreter -----------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpreters")
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=USERS)
def native(request: pytest.FixtureRequest, folder: Path) -> Iterator[LauncherProcess]:
    with launcher(under=under(request.param, folder)) as process:
        yield process


def wrong_verdicts(
    process: LauncherProcess, kind: str, script: Path, expected: dict[str, str]
) -> dict[str, str]:
    wrong = {}
    attacks = ATTACKS[::4] if process.under else ATTACKS  # interpreters take their time to start
    for attack in attacks:
        argv = [str(script), str(attack.number), *map(str, attack.arguments)]
        readable = [str(script.parent)]
        outcome = process.run(script, profile=kind, argv=argv, readable=readable)
        attack = attack._replace(expected=expected.get(attack.name, attack.expected))
        if what := unexpected(attack, kind, outcome):
            wrong[attack.name] = what
    return wrong


@needs_perl
def test_attacks_from_inside_perl_are_refused(native: LauncherProcess) -> None:
    assert wrong_verdicts(native, "perl", ATTACKERS / "call.pl", {}) == {}


@needs_node
def test_attacks_from_inside_node_are_refused(native: LauncherProcess, folder: Path) -> None:
    """A native addon is code of the attacker's own in Node's process, under Node's policy."""
    addon = folder / "addon.node"
    command = ["gcc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", str(addon)]
    subprocess.run([*command, str(ATTACKERS / "addon.c")], check=True)
    script = Path(shutil.copy(ATTACKERS / "addon.js", folder))
    assert wrong_verdicts(native, "node", script, {"io_uring_setup": N}) == {}


@needs_node
def test_node_does_without_io_uring(native: LauncherProcess, folder: Path) -> None:
    """libuv tries it (older ones only if told to) and must not be killed for that."""
    script = write_program(
        folder, "reads.js", "require('fs').readFile(__filename, (e, b) => console.log(b.length))"
    )
    environment = {**ENVIRONMENT, "UV_USE_IO_URING": "1"}
    outcome = native.run(script, profile="node", env=environment)
    assert (outcome.out, outcome.code) == (f"{script.stat().st_size}\n", 0)
