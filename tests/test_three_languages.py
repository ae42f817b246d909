"""The demo of three languages: broadcasts, children and shared KV pages, by real programs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from piehost.wire.stats import ControllerStats

from .host_harness import DEADLINE, Server, Terminal, eventually, write_program
from .interpreter_marks import needs_node

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "inferlets" / "three_languages"
PLAIN = ROOT / "inferlets" / "text_completion"
PAGE = ROOT / "docs" / "three-languages.md"
PAGE_SIZE = 16
SENTENCE = "The capital of France is Paris. "
LANGUAGES = ["python", "c", "node"]
SAME = "The same pages gave the same text to all."


class Row(NamedTuple):
    """A line of the table."""

    whose: str
    exporter: str
    importer: str
    tokens: int
    pages: int
    text: str


class Outcome(NamedTuple):
    """What the demo printed."""

    notices: list[str]
    rows: list[Row]
    heard: dict[str, set[str]]
    last: str


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    subprocess.run(["make", "-s", "-C", DEMO], check=True, timeout=DEADLINE)


def read(out: str) -> Outcome:
    before, _, rest = out.partition("pages of")
    lines, after = (part.splitlines() for part in rest.split("\n\n"))
    rows: list[Row] = []
    for line in lines[1:]:
        words = line.split(maxsplit=3 if line[0] == " " else 5)
        first = words[:2] if line[0] != " " else [rows[-1].whose, rows[-1].exporter]
        importer, tokens, pages, text = words[-4:]
        row = Row(first[0], first[1], importer, int(tokens), int(pages), json.loads(text))
        rows.append(row)
    heard = {}
    for line in after[:-1]:
        who, names = line.split(" heard from ")
        heard[who] = set(names.split(" and "))
    return Outcome(before.splitlines(), rows, heard, after[-1])


def launch(server: Server, folder: Path, *arguments: str) -> Outcome:
    done = server.terminal.run("launch", folder, *arguments, check=0)
    assert done.stderr == b""
    return read(done.stdout.decode())


def parts(prompts: Sequence[str]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def completion(server: Server, prompt: str, most: int) -> str:
    arguments = ("--prompt", prompt, "--max-tokens", str(most))
    done = server.terminal.run("launch", "--json", PLAIN, "--", *arguments, check=0)
    return "".join(json.loads(done.stdout)["messages"])


def counters(server: Server) -> ControllerStats:
    with server.client() as client:
        return client.stats().controller


def exported(server: Server, folder: Path) -> list[str]:
    """The names of all exports."""
    source = """
        from inferlet import list_exported, send

        send("\\n".join(export.name for export in list_exported().result()))
    """
    path = write_program(folder, "lists.py", source)
    return server.terminal.run("launch", path, check=0).stdout.decode().split()


@needs_node
@pytest.mark.parametrize(
    ("prompts", "most"),
    [
        (["The capital of France is", "47 + 38 =", "Q: What is the opposite of hot?\nA:"], 12),
        (["A", "Grüße aus Köln, 日本 ", "Write a list of five animals:"], 1),  # half a character
        ([SENTENCE * 2, SENTENCE * 4, "Question: How old will Anna be in 12 years?"], 70),
        ([f"{SENTENCE * n}The capital of Italy is" for n in (100, 25, 120)], 5),
    ],
)
def test_each_goes_on_from_the_pages_of_all_as_if_it_had_computed_them(
    server: Server, prompts: list[str], most: int
) -> None:
    before = counters(server)
    outcome = launch(server, DEMO, "--", *parts(prompts), "--max-tokens", str(most))
    computed = counters(server).tokens_in - before.tokens_in
    assert outcome.last == SAME and outcome.notices == []
    table = outcome.rows
    assert [(r.whose, r.importer) for r in table] == [(a, b) for a in LANGUAGES for b in LANGUAGES]
    exporters = {row.whose: row.exporter for row in table}
    assert len(set(exporters.values())) == 3
    assert all(exporters[language].startswith(f"{language}-") for language in ("c", "node"))
    for row in table:
        assert row.pages == -(-row.tokens // PAGE_SIZE)
        assert row.tokens == table[3 * LANGUAGES.index(row.whose)].tokens
    for language, prompt in zip(LANGUAGES, prompts, strict=True):
        text = completion(server, prompt, most)
        assert [r.text for r in table if r.whose == language] == [text] * 3

    prompt_tokens = sum(row.tokens for row in table) // 3
    assert prompt_tokens <= computed <= prompt_tokens + 9 * (most + 1)  # no prompt twice


@needs_node
def test_every_pair_hears_each_other(server: Server) -> None:
    outcome = launch(server, DEMO)
    assert outcome.heard == {one: set(LANGUAGES) - {one} for one in LANGUAGES}


@needs_node
def test_nothing_is_left_of_it(server: Server, tmp_path: Path) -> None:
    before = counters(server)
    for _ in range(2):  # the second finds names and pages as the first did
        assert launch(server, DEMO).last == SAME
    with server.client() as client:
        assert eventually(lambda: not client.inferlets())
        assert eventually(lambda: client.stats().controller.pages_free == before.pages_free)
    assert exported(server, tmp_path) == []


@needs_node
def test_two_groups_in_one_job_do_not_mix(server: Server) -> None:
    prompts = (["The capital of France is"] * 3, ["The capital of Italy is"] * 3)
    processes = [
        server.terminal.start("launch", "--job", "both", DEMO, "--", *parts(p)) for p in prompts
    ]
    for process, capital in zip(processes, ("Paris", "Rome"), strict=True):
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (0, b"")
        outcome = read(out.decode())
        assert len(outcome.rows) == 9
        assert all(row.text.startswith(f" {capital}.") for row in outcome.rows)
        assert outcome.heard == {one: set(LANGUAGES) - {one} for one in LANGUAGES}


@pytest.mark.parametrize("missing", [["member.mjs"], ["member.mjs", "build"]])
def test_it_goes_on_without_those_that_cannot_start(
    server: Server, tmp_path: Path, missing: list[str]
) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns(*missing))
    left = LANGUAGES[: 3 - len(missing)]
    outcome = launch(server, folder)
    assert len(outcome.notices) == len(missing)
    assert all(re.match(r"without (c|node): .* is not there", line) for line in outcome.notices)
    assert [(r.whose, r.importer) for r in outcome.rows] == [(a, b) for a in left for b in left]
    assert outcome.heard == {one: (set(left) - {one}) or {"nobody"} for one in left}
    assert outcome.last == SAME


@pytest.mark.parametrize(
    ("member", "last_words"),
    [
        ("import sys\nsys.exit('I never come')", "I never come"),
        (
            "import time\n"
            "from inferlet import broadcast, send, subscribe, get_arg\n"
            "group = subscribe(get_arg(1), job=True)\n"
            "send('ready')\n"
            "group.receive().result()\n"
            "broadcast(get_arg(1), 'saved c', job=True).result()\n"  # what is not true
            "time.sleep(3600)\n",
            "not_found",
        ),
    ],
)
def test_a_member_that_fails_ends_all(
    server: Server, tmp_path: Path, member: str, last_words: str
) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("member.mjs"))
    (folder / "bad.py").write_text(member)
    manifest = (folder / "inferlet.toml").read_text().replace("build/member", "bad.py")
    (folder / "inferlet.toml").write_text(manifest)
    done = server.terminal.run("launch", folder, check=1)
    assert last_words in done.stderr.decode() and b"Traceback" not in done.stderr
    with server.client() as client:
        assert eventually(lambda: not client.inferlets())
    assert exported(server, tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--", "--prompt", ""], "give one to three texts"),
        (["--", *parts("abcd")], "give one to three texts"),
        (["--", "--max-tokens", "0"], "use 1 to 512"),
        (["--quota", "export_pages=1"], "over_quota"),
        (["--quota", "children=0"], "over_quota"),
    ],
)
def test_what_cannot_be_is_refused(server: Server, arguments: list[str], says: str) -> None:
    done = server.terminal.run("launch", DEMO, *arguments, check=1)
    assert says in done.stderr.decode() and b"Traceback" not in done.stderr


def test_the_files_are_short_and_the_codec_is_one_file() -> None:
    sources = [path for path in DEMO.iterdir() if path.suffix in (".py", ".c", ".mjs")]
    assert {path.name for path in sources} == {"main.py", "member.py", "member.c", "member.mjs"}
    sources.append(ROOT / "inferlets" / "node" / "text_completion" / "abi.mjs")
    assert all(len(path.read_text().splitlines()) < 150 for path in sources)


@needs_node
def test_the_commands_of_the_page(terminal: Terminal) -> None:
    page = PAGE.read_text()
    commands = [line.split() for line in re.findall(r"^piehost (.*)$", page, re.MULTILINE)]
    shown = re.search(r"^```\n(pages of.*?)```", page, re.DOTALL | re.MULTILINE)
    assert shown and commands[0] == ["launch", "inferlets/three_languages"]
    done = terminal.run("launch", DEMO, check=0)
    assert done.stdout.decode() == shown[1]
    line = re.search(r'-- (--prompt ".*)$', page, re.MULTILINE)
    assert line and len(commands) == 2
    other = terminal.shell(f'"$@" launch {DEMO} -- {line[1]}')
    assert other.returncode == 0 and other.stdout.decode().splitlines()[-1] == SAME
    assert "Madrid" in other.stdout.decode() and "Answer: 85" in other.stdout.decode()
