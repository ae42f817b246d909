"""Inferlet programs as processes of their own, with descriptors 3, 4, 6 and 7 as piehost gives."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inferlet import abi
from inferlet.errors import BackendError
from scripted import Host, Outcome, run_program
from scripted_device import BOS, EOS, MAX_CONTEXT, continuation

INFERLETS = Path(__file__).parents[3] / "inferlets"
PROMPT = [BOS, *b"Hi"]
Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(source: str | Path, *args: str, **options: Any) -> Outcome:
        script = source
        if isinstance(source, str):
            script = tmp_path / "script.py"
            script.write_text("from inferlet import *\n" + textwrap.dedent(source), "utf-8")
        outcome = run_program(Path(script), args, tmp_path=tmp_path, **options)
        assert not outcome.controller.broken
        return outcome

    return run


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode()


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode", "context_completion"])
def test_the_completion_programs_give_the_same_text(run: Run, name: str) -> None:
    outcome = run(INFERLETS / name / "main.py", "--prompt", "Hi", "--max-tokens", "40")
    assert (outcome.status, outcome.stderr, outcome.stdout) == (0, "", "")
    assert outcome.text == text_of(continuation(PROMPT, 40))
    assert len(outcome.sent) > 1  # as it comes


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode", "context_completion"])
def test_they_stop_at_the_end_token_without_printing_it(run: Run, name: str) -> None:
    outcome = run(
        INFERLETS / name / "main.py",
        *("--prompt", "Hi", "--max-tokens", "40"),
        rule=lambda seen: EOS if len(seen) == 9 else 97 + len(seen),
    )
    assert (outcome.status, outcome.text) == (0, "defghi")


@pytest.mark.parametrize("block", [0, 1])
def test_the_programs_of_the_readme(run: Run, block: int) -> None:
    source = (INFERLETS.parent / "bindings/python/README.md").read_text()
    program = source.split("```python\n")[1 + block].split("```")[0]
    outcome = run(program, "--prompt", "Hi", "--max-tokens", "10")
    assert (outcome.status, outcome.text) == (0, text_of(continuation(PROMPT, 10)))


def test_text_completion_passes_its_sampling_on(run: Run) -> None:
    outcome = run(
        INFERLETS / "text_completion" / "main.py",
        *("--prompt=Hi", "--max-tokens=3", "--temperature=0.5", "--top-p", "0.5", "--seed", "7"),
    )
    samples = outcome.controller.of(abi.Sample)
    assert [(c.temperature, c.top_p, c.seed) for c in samples] == [(0.5, 0.5, 7)] * 3
    frames = len(outcome.controller.frames) + outcome.controller.answer_frames
    assert frames <= 5


def test_text_completion_needs_few_frames(run: Run) -> None:
    outcome = run(INFERLETS / "text_completion" / "main.py", "--prompt=Hi", "--max-tokens=128")
    frames = len(outcome.controller.frames) + outcome.controller.answer_frames
    assert frames <= 0.3 * 128


def test_a_prompt_longer_than_the_context(run: Run) -> None:
    outcome = run(INFERLETS / "text_completion" / "main.py", "--prompt", "x" * MAX_CONTEXT)
    assert outcome.status == 1 and not outcome.sent
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: bad_position:") and "(try: leave out 1 tokens" in line


def test_a_backend_error_is_one_line_and_what_came_before_is_sent(run: Run) -> None:
    def prepare(host: Host) -> None:
        host.controller.fail_next = (abi.Sample, BackendError("the step\nfailed", "try again"))

    program = """
        @inferlet
        def main(model: Model):
            send("before")
            yield from model.context("Hi").generate(5)
    """
    outcome = run(program, prepare=prepare)
    assert outcome.status == 1 and outcome.sent == [b"before"]
    assert outcome.stderr == "error: backend: the step failed (try: try again)\n"
    debug = run(program, "--debug", prepare=prepare)
    assert debug.status == 1 and "Traceback" in debug.stderr
    assert "Traceback" in run(program, prepare=prepare, env={"PIEHOST_DEBUG": "1"}).stderr


ECHO = """
    @inferlet
    def main(text: str, n: int = 2, scale: float = 0.5, loud: bool = False, quiet: bool = True,
             tag: str | None = None):
        '''Says what it was given.'''
        return repr((text, n, scale, loud, quiet, tag))
"""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--text", "a"], ("a", 2, 0.5, False, True, None)),
        (["--text=a=b", "--n=-3", "--scale", "-1e-3"], ("a=b", -3, -1e-3, False, True, None)),
        (["--text", "--n"], ("--n", 2, 0.5, False, True, None)),
        (["--text", "", "--loud", "--no-quiet"], ("", 2, 0.5, True, False, None)),
        (
            ["--no-loud", "--text", "x", "--text", "y", "--tag", "z"],
            ("y", 2, 0.5, False, True, "z"),
        ),
    ],
)
def test_command_lines(run: Run, args: list[str], expected: tuple[object, ...]) -> None:
    outcome = run(ECHO, *args)
    assert (outcome.status, outcome.stderr, outcome.text) == (0, "", repr(expected))


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([], "--text is required"),
        (["--text"], "--text needs a value"),
        (["--text", "a", "--n", "x"], "--n takes a whole number, not 'x'"),
        (["--text", "a", "--scale="], "--scale takes a number, not ''"),
        (["--text", "a", "--loud=1"], "--loud takes no value"),
        (["--text", "a", "--nope"], "there is no option '--nope'"),
        (["--text", "a", "--no-n"], "there is no option '--no-n'"),
        (["a"], "there is no option 'a'"),
    ],
)
def test_wrong_command_lines(run: Run, args: list[str], complaint: str) -> None:
    outcome = run(ECHO, *args)
    assert (outcome.status, outcome.text) == (2, "")
    assert outcome.stderr == f"error: {complaint} (try: --help)\n"


def test_help(run: Run) -> None:
    outcome = run(ECHO, "--help")
    assert outcome.status == 0
    assert outcome.text.startswith(
        "usage: piehost launch PROGRAM -- [OPTIONS]\n\nSays what it was given.\n"
    )
    for line in ("--text STR", "required", "--scale FLOAT", "default: 0.5", "--loud, --no-loud"):
        assert line in outcome.text


CHOICES = """
    from enum import Enum
    from typing import Annotated, Literal

    class Size(Enum):
        SMALL = "s"
        LARGE = "l"

    @inferlet
    def main(
        mode: Literal["fast", "slow"] = "fast",
        n: Literal[1, 2] | None = None,
        size: Size = Size.SMALL,
        tag: list[str] = ["x"],
        at: list[int] = [],
        sizes: list[Size] | None = None,
        steps: Annotated[int, "how many to take"] = 3,
    ):
        '''Chooses.

        Args:
            mode: how to go
                about it
            size (Size): of the thing
            steps: never shown

        Returns what it chose.
        '''
        return repr((mode, n, size.name, tag, at, sizes and [s.name for s in sizes], steps))
"""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], ("fast", None, "SMALL", ["x"], [], None, 3)),
        (
            ["--mode=slow", "--n", "2", "--size", "l", "--tag", "a", "--tag=b"],
            ("slow", 2, "LARGE", ["a", "b"], [], None, 3),
        ),
        (
            ["--at=1", "--sizes=s", "--at=2", "--sizes=l"],
            ("fast", None, "SMALL", ["x"], [1, 2], ["SMALL", "LARGE"], 3),
        ),
    ],
)
def test_choices_and_lists(run: Run, args: list[str], expected: tuple[object, ...]) -> None:
    outcome = run(CHOICES, *args)
    assert (outcome.status, outcome.stderr, outcome.text) == (0, "", repr(expected))


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--mode", "medium"], "--mode is one of fast, slow, not 'medium'"),
        (["--n=3"], "--n is one of 1, 2, not '3'"),
        (["--size", "LARGE"], "--size is one of s, l, not 'LARGE'"),
        (["--at", "x"], "--at takes a whole number, not 'x'"),
    ],
)
def test_wrong_choices(run: Run, args: list[str], complaint: str) -> None:
    outcome = run(CHOICES, *args)
    assert (outcome.status, outcome.stderr) == (2, f"error: {complaint} (try: --help)\n")


def test_help_says_what_parameters_are(run: Run) -> None:
    text = run(CHOICES, "--help").text
    assert "Chooses.\n\nReturns what it chose.\n" in text and "Args:" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "--mode fast|slow how to go about it; default: fast",
        "--n 1|2",
        "--size s|l of the thing; default: s",
        "--tag STR may be repeated; default: x",
        "--at INT may be repeated",
        "--steps INT how many to take; default: 3",
    ):
        assert line in lines


def test_every_call_in_a_program_of_its_own(run: Run) -> None:
    """Its own process, the descriptors as piehost gives them."""
    program = """
        import numpy as np

        @inferlet
        async def main(model: Model, q: Queue):
            out = q.forward(q.embed_txt([1, 2, 3]))
            mask = np.zeros(model.vocab_size, np.bool_)
            mask[7] = True
            vectors = await q.read_emb(out)
            back = q.read_emb(q.write_emb(vectors))
            subscription = subscribe("t")
            broadcast("t", "hi")
            store_set("k", "v")
            message = await subscription.receive()
            yield f"{await q.sample(out, mask=mask)} {(vectors == await back).all()} "
            yield f"{message.text} from {message.sender} {await store_get('k')} {job()}"
    """
    assert run(program).text == "7 True hi from test b'v' night"


def test_what_a_program_may_be(run: Run) -> None:
    assert run("@inferlet\ndef main(): return None").sent == []
    assert run("@inferlet\ndef main(): return b'\\xff'").sent == [b"\xff"]
    assert run("@inferlet\ndef main(): return 'x' * 70000").sent == [b"x" * 60000, b"x" * 10000]
    generator = "@inferlet\ndef main():\n  yield 'a'\n  yield 1\n  send('b')"
    assert run(generator).sent == [b"a", b"1", b"b"]
    coroutine = "@inferlet\nasync def main(model: Model): return await model.tokenize('A')"
    assert run(coroutine).text == "[256, 65]"
    stream = """
        @inferlet
        async def main(model: Model):
            async for piece in model.context("Hi").generate(9):
                yield piece
    """
    assert run(stream).text == text_of(continuation(PROMPT, 9))
    queue = """
        @inferlet
        def main(q: Queue):
            return str(q.sample(q.forward(q.embed_txt([1, 2]))).result())
    """
    outcome = run(queue)
    assert outcome.text == str(continuation([1, 2], 1)[0])
    assert outcome.controller.of(abi.DestroyQueue)


def test_what_is_returned_behind_yields_and_futures_are_sent_too(run: Run) -> None:
    assert run("@inferlet\ndef main():\n  yield 'a'\n  return 'b'").sent == [b"a", b"b"]
    future = "@inferlet\ndef main(model: Model):\n  yield model.tokenize('A')"
    assert run(future).text == "[256, 65]"


def test_a_stream_is_no_text(run: Run) -> None:
    body = "@inferlet\n{} main(model: Model):\n  yield model.context('Hi').generate(3)"
    for kind in ("def", "async def"):
        outcome = run(body.format(kind))
        assert (outcome.status, outcome.sent) == (1, [])
        assert "TextStream" in outcome.stderr and "`yield from` it" in outcome.stderr
        assert outcome.stderr.count("\n") == 1


def test_a_model_without_an_annotation_is_the_model(run: Run) -> None:
    source = "@inferlet\ndef main(model, queue, x): return f'{model} {type(queue).__name__} {x}'"
    outcome = run(source, "--x", "1")
    assert outcome.text.endswith("> Queue 1") and outcome.text.startswith("<Model ")
    named = "@inferlet\ndef main(model: str): return model"
    assert run(named, "--model", "mine").text == "mine"


def test_a_program_ends_with_its_own_status(run: Run) -> None:
    assert run("@inferlet\ndef main():\n  send('x')\n  raise SystemExit(7)").status == 7
    crash = run("@inferlet\ndef main():\n  send('x')\n  return 1 / 0")
    assert crash.status == 1 and "ZeroDivisionError" in crash.stderr and crash.sent == [b"x"]


def test_what_was_sent_arrives_without_the_decorator(run: Run) -> None:
    outcome = run("send('a'); send('b' + get_arg(0)); send(' '.join(args()))", "1", "2")
    assert outcome.sent == [b"a", b"b1", b"1 2"]
    failed = run("send(get_arg(5))")
    assert failed.status == 1 and "1 were given" not in failed.stderr


def test_receive(run: Run) -> None:
    program = """
        @inferlet
        def main():
            yield receive().result() + b"!"
            yield receive().result() + b"!"
            try:
                receive().result()
            except ClosedError as error:
                yield error.hint
    """
    assert run(program, inbox=[b"one", b"two"]).sent == [b"one!", b"two!", b"stop receiving"]


def test_models_and_traits(run: Run) -> None:
    program = """
        model, = available_models()
        send(model.name)
        send(" ".join(available_traits(model)))
        send(" ".join(available_traits("scripted")[:1]))
        try:
            available_traits("other")
        except ArgumentError as error:
            send(error.hint)
    """
    assert run(program).sent == [
        b"scripted",
        b"Allocate Forward InputText Tokenize OutputText OutputEmbed",
        b"Allocate",
        b"use one of: scripted",
    ]


def test_a_parameter_that_cannot_be_an_option_is_refused_at_once(run: Run) -> None:
    outcome = run("@inferlet\ndef main(x: list): pass")
    assert outcome.status == 1 and "parameter x of main cannot be an option" in outcome.stderr


def test_an_imported_program_does_not_run(tmp_path: Path, run: Run) -> None:
    (tmp_path / "other.py").write_text(
        "from inferlet import inferlet\n@inferlet\ndef main(): return 'ran'\n"
    )
    assert run("import other\nsend('only me ' + other.main())").sent == [b"only me ran"]


def test_the_controller_s_end_is_an_error_of_one_line(run: Run) -> None:
    program = """
        @inferlet
        def main(model: Model):
            model.tokenize("x").result()
            receive().result()
    """

    def prepare(host: Host) -> None:
        host.controller.ends_at = abi.Receive

    outcome = run(program, prepare=prepare)
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: closed: the connection to piehost ended")


def test_outside_piehost_it_says_how_to_run_it() -> None:
    done = subprocess.run(
        [sys.executable, INFERLETS / "text_completion" / "main.py", "--prompt", "x"],
        capture_output=True,
        text=True,
        close_fds=True,
    )
    assert done.returncode == 1
    assert "piehost launch" in done.stderr and "Traceback" not in done.stderr


def test_importing_touches_no_descriptor() -> None:
    """The zygote imports before there are any."""
    program = (
        "import os, sys\n"
        "os.closerange(3, 10)\n"
        "opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(a) if e == 'mmap.__new__' else None)\n"
        "import inferlet\n"
        "fds = set(os.listdir('/proc/self/fd'))\n"
        "print(opened, len(fds - {'0', '1', '2'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[] 1\n"  # the one that lists them


def test_import_does_not_load_numpy() -> None:
    """It takes 0.1 s, and most programs never need it."""
    source = "import sys, inferlet; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_what_waits_for_its_turn_is_sent_before_the_end(run: Run) -> None:
    outcome = run("for i in range(500): store_set(str(i), 'v')")
    assert outcome.status == 0 and len(outcome.controller.services.store) == 500
