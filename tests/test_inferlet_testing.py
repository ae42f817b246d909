"""`inferlet.testing`: pytest on a user's folder, as a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .host_harness import Terminal, write_program
from .pytest_harness import run_pytest

COMPLETE = """
    from inferlet import Model, inferlet

    @inferlet
    def complete(model: Model, prompt: str, max_tokens: int = 16):
        with model.context(prompt) as context:
            yield from context.generate(max_tokens)
"""


class Project:
    """A user's folder, and pytest on it."""

    def __init__(self, folder: Path, terminal: Terminal) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        self.terminal = terminal
        self._site = folder / "site"
        write_program(self.folder, "complete.py", COMPLETE)

    def test(self, source: str, *arguments: str, first: str = "") -> str:
        """pytest's output for a file of tests. Nothing is left running when it ends."""
        write_program(self.folder, "test_it.py", source)
        self.done: subprocess.CompletedProcess[str] = run_pytest(
            self.folder, self.terminal.environment, self._site, *arguments, first=first
        )
        left = list(self.terminal.run_dir.iterdir()) if self.terminal.run_dir.exists() else []
        assert left == []
        return self.done.stdout + self.done.stderr


@pytest.fixture
def project(tmp_path: Path, terminal: Terminal) -> Project:
    return Project(tmp_path, terminal)


def passed(output: str) -> int:
    words = output.splitlines()[-1].split()
    assert "passed" in words and "failed" not in words, output
    return int(words[words.index("passed") - 1])


def test_what_a_run_tells(project: Project) -> None:
    write_program(
        project.folder,
        "talk.py",
        """
        import sys
        from inferlet import ClosedError, args, receive, send
        from inferlet.runtime import runtime

        print("out", args(), runtime.startup.limits.kv_pages)
        print("err", file=sys.stderr)
        try:
            while True:
                send(receive().result().upper())
        except ClosedError:
            sys.exit(7)
        """,
    )
    write_program(project.folder, "broken.py", "def f(:\n")
    write_program(project.folder, "crash.py", "import os; os.abort()")
    output = project.test(
        """
        def test_everything(piehost):
            run = piehost.launch(
                "talk.py", "one", "two", input=["a", b"\\xff", "\\u00e9"], quota={"kv_pages": 5}
            )
            assert run.messages == [b"A", b"\\xff", "\\u00e9".encode().upper()]
            assert run.text == "A\\ufffd\\u00e9".encode().decode()
            assert run.stdout == "out ['one', 'two'] 5\\n"
            assert run.stderr == "err\\n"
            assert (run.exit_code, run.reason) == (7, None)

        def test_a_program_that_is_not_there(piehost):
            run = piehost.launch("nothing.py")
            assert run.exit_code == 127
            assert run.reason.code == "not_found" and run.reason.hint

        def test_a_program_that_does_not_parse(piehost):
            assert piehost.launch("broken.py").exit_code == 126

        def test_a_quota_there_is_not(piehost):
            run = piehost.launch("complete.py", "--prompt", "x", quota={"kv_pagez": 5})
            assert (run.exit_code, run.reason.code) == (126, "bad_quota")

        def test_a_crash(piehost):
            run = piehost.launch("crash.py")
            assert run.exit_code == 128 + 6
            assert "SIGABRT" in run.reason.what

        def test_the_counters(piehost):
            piehost.says("a", " b")
            run = piehost.launch("complete.py", "--prompt", "a")
            assert run.stats.tokens_out == 2  # " b" and the end
        """,
    )
    assert passed(output) == 6


def test_each_test_has_its_own_script(project: Project) -> None:
    output = project.test(
        """
        import psutil

        def hosts():
            return [p for p in psutil.Process().children() if "piehost.host.server" in p.cmdline()]

        def ask(piehost, prompt="Who?"):
            return piehost.launch("complete.py", "--prompt", prompt).text

        def test_one(piehost):
            piehost.says("Who?", " Me.")
            assert ask(piehost) == " Me."

        def test_another(piehost):
            piehost.says("Who?", ' "You", \\\\ \\u2603 \\U0001F600.')
            assert ask(piehost) == ' "You", \\\\ \\u2603 \\U0001F600.'

        def test_one_again_on_the_same_host(piehost):
            before = hosts()
            piehost.says("Who?", " Me.")
            assert ask(piehost) == " Me."
            assert hosts() == before

        def test_none(piehost):
            assert ask(piehost).startswith(" I am a scripted model")

        def test_it_may_grow(piehost):
            piehost.says("Who?", " Me.")
            piehost.otherwise(" What?")
            assert (ask(piehost), ask(piehost, "Hm")) == (" Me.", " What?")
            piehost.says("Who?", " You.")
            assert (ask(piehost), ask(piehost, "Hm")) == (" You.", " What?")

        def test_unscripted_words_are_the_same_each_time(piehost):
            piehost.says("Who?", " Me.")
            assert ask(piehost, "Hm") == ask(piehost, "Hm") != ask(piehost, "Ho")

        def test_hosts_stay_few(piehost):
            for i in range(6):
                piehost.says("Who?", f" {i}")
                assert ask(piehost) == f" {i}"
            assert len(hosts()) == 4
        """,
    )
    assert passed(output) == 7


def test_what_a_test_stores_no_other_sees(project: Project) -> None:
    write_program(
        project.folder,
        "keep.py",
        """
        from inferlet import args, store_get, store_set

        for value in args():
            store_set("key", value).result()
        print(store_get("key").result())
        """,
    )
    output = project.test(
        """
        def test_one(piehost):
            assert piehost.launch("keep.py", "mine").stdout == "b'mine'\\n"
            assert piehost.launch("keep.py").stdout == "b'mine'\\n"

        def test_two(piehost):
            assert piehost.launch("keep.py").stdout == "None\\n"
        """,
    )
    assert passed(output) == 2


def test_other_models(project: Project) -> None:
    (project.folder / "script.toml").write_text('[otherwise]\ntext = " from the file"\n')
    output = project.test(
        """
        def test_the_embedded_model(piehost):
            piehost.use_model("default")
            run = piehost.launch("complete.py", "--prompt", "The capital of France is")
            assert run.text.startswith(" Paris")

        def test_a_script_file(piehost):
            piehost.use_model("scripted:script.toml")
            assert piehost.launch("complete.py", "--prompt", "x").text == " from the file"
        """,
    )
    assert passed(output) == 2


def test_a_wrong_expectation_fails_and_shows_the_run(project: Project) -> None:
    write_program(
        project.folder, "fails.py", "import sys; print('half'); sys.exit('it went wrong')"
    )
    output = project.test(
        """
        def test_wrong_text(piehost):
            piehost.says("The capital of France is", " Paris.")
            run = piehost.launch("complete.py", "--prompt", "The capital of France is")
            assert run.text == " Rome."

        def test_wrong_code(piehost):
            assert piehost.launch("fails.py").exit_code == 0

        def test_not_there(piehost):
            assert piehost.launch("nothing.py").text == "x"

        def test_a_list_of_arguments(piehost):
            piehost.launch("complete.py", ["--prompt", "x"])
        """,
    )
    assert "4 failed" in output
    assert "TypeError: an argument of complete.py is ['--prompt', 'x'], no str" in output
    assert "piehost launch complete.py -- --prompt 'The capital of France is'" in output
    for line in ("message b' Paris'", "stdout half", "stderr it went wrong", "exit code 127"):
        assert f"\n{line}\n" in output
    assert "there is no program" in output


def test_a_model_that_cannot_be_loaded_fails_the_test_with_the_reason(project: Project) -> None:
    (project.folder / "wrong.toml").write_text("[[say]]\nafter = 1\n")
    output = project.test(
        """
        def test_it(piehost):
            piehost.use_model("scripted:wrong.toml")
            piehost.launch("complete.py", "--prompt", "x")

        def test_the_next_one(piehost):
            assert piehost.launch("complete.py", "--prompt", "x").text
        """,
    )
    assert "1 failed, 1 passed" in output
    assert "wrong.toml is wrong" in output and "try:" in output
    assert "Traceback" not in output and "testing.py" not in output
    assert output.count("\n  why: ") == 1, "it is said once"


def test_a_program_that_does_not_end_is_ended_and_shown(project: Project) -> None:
    write_program(
        project.folder,
        "endless.py",
        """
        import time
        from inferlet import flush, send

        send("so far")
        flush()
        while True:
            time.sleep(1)
        """,
    )
    output = project.test(
        """
        import pytest

        def test_it(piehost):
            with pytest.raises(TimeoutError, match="(?s)not ended after 1 s.*so far"):
                piehost.launch("endless.py", timeout=1)
            assert piehost.launch("complete.py", "--prompt", "x").exit_code == 0
        """,
    )
    assert passed(output) == 1


def test_without_piehost_it_says_what_is_missing(project: Project, tmp_path: Path) -> None:
    empty = tmp_path / "hides"
    empty.mkdir()
    hides = "raise ModuleNotFoundError(\"No module named 'piehost'\", name='piehost')\n"
    (empty / "piehost.py").write_text(hides)
    output = project.test(
        """
        def test_it(piehost):
            pass

        def test_without_the_fixture():
            pass
        """,
        first=str(empty),
    )
    assert "1 passed, 1 error" in output
    assert "install piehost beside inferlet" in output
    assert "testing.py" not in output


def test_the_sandbox_is_real(project: Project) -> None:
    write_program(
        project.folder,
        "escape.py",
        """
        import os

        for attempt in (lambda: open("/etc/shadow"), os.fork, lambda: open("new", "w")):
            try:
                attempt()
                print("done")
            except OSError:
                print("refused")
        """,
    )
    output = project.test(
        """
        def test_it(piehost):
            assert piehost.launch("escape.py").stdout == "refused\\n" * 3
        """,
    )
    assert passed(output) == 1
