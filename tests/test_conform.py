"""`piehost conform`: both bindings keep every rule, and each broken one breaks the rule it should.

Real hosts, the scripted model, real processes in the sandbox.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inferlet import abi
from inferlet.errors import BY_CODE

from piehost.host.client import Client
from piehost.host.conform import bad_frames
from piehost.host.conform.report import as_json
from piehost.host.conform.rules import RULES, judge
from piehost.host.conform.runs import Run
from piehost.host.conform.trials import Subject, Trials
from piehost.host.ephemeral import EphemeralHost
from piehost.host.errors import HostError
from piehost.host.frames import BadFraming, next_frame
from piehost.host.options import Options

from .c_driver import make
from .host_harness import Terminal, write_program
from .interpreter_marks import needs_node, needs_perl
from .web_server import Request, WebServer

ROOT = Path(__file__).resolve().parent.parent
C = ROOT / "bindings" / "c"
BROKEN = ROOT / "tests" / "broken_bindings"
VECTORS = ROOT / "bindings" / "vectors"
PAGE = ROOT / "docs" / "conformance.md"
# seconds, for programs that never end; only those get there. Who spins takes the processors from
# the runs beside it, which must not be taken for hanging
HANGING = {"waits_for_ever_after_errors": 6, "spins_when_cut_off": 30}

# the rule that each defect of tests/broken_bindings/main.py breaks
DEFECTS = {
    "sets_the_more_bit": "frame-header",
    "leaves_half_a_frame": "frame-whole",
    "adds_an_octet": "frame-body",
    "fills_frames_too_much": "frame-commands",
    "invents_an_op": "command-op",
    "sends_text_for_octets": "command-fields",
    "adds_a_field": "command-fields",
    "counts_requests_in_64_bits": "request-id",
    "has_one_request_id": "request-unique",
    "calls_what_kills": "system-calls",
    "ends_with_a_code": "exit-code",
    "counts_handles_from_0": "handle-range",
    "makes_a_handle_twice": "handle-fresh",
    "uses_what_it_freed": "handle-live",
    "takes_one_kind_for_another": "handle-live",
    "embeds_a_token_before_it_is_sampled": "token-sampled",
    "goes_on_after_errors": "queue-errors",
    "has_odd_offsets": "ring-out-inside",
    "believes_in_a_larger_ring": "ring-out-inside",
    "has_one_place_for_all": "ring-out-free",
    "puts_masks_outside": "ring-in-inside",
    "writes_masks_anew": "ring-in-still",
    "takes_a_read_for_a_frame": "answers-split",
    "takes_answers_in_the_order_it_asked": "answers-order",
    "knows_short_forms_only": "answers-forms",
    "refuses_new_keys": "startup-keys",
    "crashes_with_small_limits": "startup-limits",
    "waits_for_ever_after_errors": "errors-taken",
    "crashes_of_unknown_codes": "errors-unknown",
    "receives_without_end": "receive-closed",
    "never_reads": "answers-read",
    "ends_happily_when_cut_off": "connection-lost",
    "spins_when_cut_off": "connection-lost",
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a host with the scripted model."""
    with pytest.MonkeyPatch.context() as patch:
        store = tmp_path_factory.mktemp("store") / "store.sqlite3"
        patch.setenv("PIEHOST_STORE", str(store))
        with EphemeralHost(Options(model="scripted")) as host:
            yield host.client


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    """Sends back what it gets."""

    def echo(request: Request) -> None:
        request.answer(request.command.encode() + b" " + b"".join(request.parts()))

    with WebServer() as server:
        server.routes["/echo"] = echo
        yield server


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c") / "conformance"
    sources = [C / "tests" / "conformance.c", C / "inferlet.c"]
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"]
    subprocess.run(["gcc", *flags, "-static", f"-I{C}", "-o", path, *sources], check=True)
    return path


def examine(client: Client, folder: Path, subject: Subject) -> tuple[dict[str, Any], list[Run]]:
    """The document that `--json` prints, and the runs."""
    runs = Trials(client, subject, folder).run()
    verdicts = judge(runs)
    document = as_json(verdicts, runs, not any(v.broken for v in verdicts.values()))
    return document, runs


def states(document: dict[str, Any], state: str) -> dict[str, Any]:
    """The evidence of the rules in that state."""
    return {r["id"]: r["evidence"] for r in document["rules"] if r["state"] == state}


# --- both bindings ------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["python", "c"])
def test_the_bindings_keep_every_rule_and_use_every_command(
    language: str, scripted: Client, web: WebServer, tmp_path: Path, c_program: Path
) -> None:
    url = web.url("/echo")
    program = ROOT / "bindings" / "python" / "tests" / "conformance"
    args = ["--url", url] if language == "python" else [url]
    subject = Subject(
        program=program if language == "python" else c_program,
        args=args,
        inputs=[b"hello"],
        egress=[web.place],
        patience=120,
    )
    document, runs = examine(scripted, tmp_path, subject)
    assert states(document, "broken") == {}
    assert states(document, "not exercised") == {}
    plain = runs[0]
    used = {type(sent.command).__struct_config__.tag for sent in plain.sent()}
    assert used == {kind.__struct_config__.tag for kind in abi.Command.__subclasses__()}

    said = {run.weather: b"".join(run.messages).decode() for run in runs}
    for run in runs:
        if run.kind == "error":
            assert run.code == 0, (run.weather, run.last_words)
    named = set(re.findall(r"\w+", "".join(said.values())))
    assert {kind.name for kind in BY_CODE.values()} - {"bad_frame"} <= named
    for weather in ("octets", "late", "reordered", "wide", "keys"):
        assert said[weather] == said["plain"]


@pytest.mark.parametrize(
    "name",
    [
        *("text_completion", "explicit_decode", "context_completion"),
        *("c/text_completion", "c/explicit_decode"),
        pytest.param("node/text_completion", marks=needs_node),
        pytest.param("perl/text_completion", marks=needs_perl),
    ],
)
def test_the_inferlets_conform(name: str, scripted: Client, tmp_path: Path) -> None:
    if name.startswith("c/"):
        make(ROOT / "inferlets" / "c")
    args = ["--prompt", "The capital of France is", "--max-tokens", "8"]
    subject = Subject(program=ROOT / "inferlets" / name, args=args, patience=120)
    document, _ = examine(scripted, tmp_path, subject)
    assert states(document, "broken") == {}
    assert {"answers-split", "errors-taken", "connection-lost"} <= states(document, "kept").keys()


# --- broken ones --------------------------------------------------------------------------------


def test_every_rule_but_one_has_a_defect_that_breaks_it() -> None:
    """`answers-late` is left: whoever cannot take two frames at once fails by chance without it."""
    assert {rule.id for rule in RULES} - set(DEFECTS.values()) == {"answers-late"}
    source = (BROKEN / "main.py").read_text()
    assert set(re.findall(r"@defect\ndef (\w+)", source)) == {*DEFECTS, "none"}


def test_without_a_defect_the_raw_binding_keeps_every_rule(
    scripted: Client, tmp_path: Path
) -> None:
    subject = Subject(program=BROKEN, args=["none"], inputs=[b"hello"], patience=60)
    document, _ = examine(scripted, tmp_path, subject)
    assert len(states(document, "kept")) == len(RULES), document["rules"]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_breaks_its_rule_and_no_other(
    defect: str, scripted: Client, tmp_path: Path
) -> None:
    patience = HANGING.get(defect, 60)
    subject = Subject(program=BROKEN, args=[defect], inputs=[b"hello"], patience=patience)
    document, _ = examine(scripted, tmp_path, subject)
    broken = states(document, "broken")
    assert list(broken) == [DEFECTS[defect]], document["rules"]
    assert all(evidence.what for evidence in broken[DEFECTS[defect]])
    assert not document["passed"]


def test_the_frames_that_the_vectors_refuse_are_each_blamed_on_a_rule() -> None:
    rules = set()
    for vector in json.loads((VECTORS / "bad_frames.json").read_text()):
        if vector["direction"] != "to_controller":
            continue
        octets = bytes.fromhex(vector["frame_hex"])
        try:
            place = next_frame(octets, 0)
        except BadFraming:
            continue
        if place is not None:
            rules.add(bad_frames.find(octets[slice(*place)]).rule)
    frames = {"frame-body", "frame-commands", "command-op", "command-fields", "request-id"}
    assert rules == {*frames, "handle-range"}


@pytest.mark.parametrize("weather", ["storm", "error:1", "error:1:2:x", "cut:", "plain:1"])
def test_a_weather_that_there_is_not_is_refused(
    weather: str, scripted: Client, tmp_path: Path
) -> None:
    run = scripted.launch(BROKEN, ["none"], record=tmp_path / "r.pie", weather=weather)
    with pytest.raises(HostError, match="no weather"):
        run.result(30)
    assert not (tmp_path / "r.pie").exists()


def test_only_a_recorded_run_has_a_weather(scripted: Client) -> None:
    with pytest.raises(HostError, match="recorded"):
        scripted.launch(BROKEN, ["none"], weather="late").result(30)


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_reports_and_exits(terminal: Terminal) -> None:
    done = terminal.run("conform", BROKEN, "--", "sends_text_for_octets", check=1)
    assert done.stderr == b""
    report = done.stdout.decode()
    assert re.search(r"^broken +command-fields ", report, re.MULTILINE)
    assert "in weather plain, frame 1: command 1 of the frame: Send, data" in report
    assert re.search(r"\d+ rules: \d+ kept, 1 broken, \d+ not exercised; 2 runs", report)

    ends = ("conform", "--json", BROKEN, "--", "ends_with_a_code")
    document = json.loads(terminal.run(*ends, check=1).stdout)
    assert not document["passed"]
    (evidence,) = states(document, "broken")["exit-code"]
    assert evidence == {"weather": "plain", "where": "", "what": "exit code 3"}
    assert [run["weather"] for run in document["runs"]] == ["plain", "again"]


def test_what_is_not_exercised_fails_only_if_it_is_required(
    terminal: Terminal, tmp_path: Path
) -> None:
    program = write_program(
        tmp_path,
        "hello.py",
        """
        from inferlet import send

        send("hello")
        """,
    )
    assert b" 0 broken, " in terminal.run("conform", program, check=0).stdout
    terminal.run("conform", "--require", "ring-in-still", program, check=1)
    terminal.run("conform", "--require", "frame-whole", program, check=0)
    terminal.run("conform", "--require", "all", program, check=1)
    terminal.run("conform", "--require", "no-such-rule", program, check=2)


def test_what_cannot_run_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    done = terminal.run("conform", tmp_path / "nothing", check=127)
    assert b"there is no program" in done.stderr and not done.stdout


def test_the_page_lists_the_rules() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d, ]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(rule.id, rule.section, rule.text) for rule in RULES]
