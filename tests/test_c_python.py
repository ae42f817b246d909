"""The support layers of C and Python on a real server with the real model: the same text for the
same options, each other's saved contexts, numbers that plain calls confirm."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import c_fixtures
from .c_driver import C, make
from .host_harness import Server, new_terminal, write_program

pytestmark = c_fixtures.needs_gcc

SUPPORT = C / "build" / "support"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    make(C, "build/support")
    with new_terminal() as terminal, terminal.server() as running:
        yield running


def launch(server: Server, *arguments: object) -> str:
    return server.terminal.run("launch", *arguments, check=0).stdout.decode()


PYTHON = {
    "text": """
        from inferlet import args, available_models, send

        prompt, count, temperature, top_p, seed, repetition, presence, stop = args()
        with available_models()[0].context(prompt) as context:
            for piece in context.generate(
                int(count), stop=[], stop_strings=[stop], temperature=float(temperature),
                top_p=float(top_p), seed=int(seed), repetition_penalty=float(repetition),
                presence_penalty=float(presence),
            ):
                send(piece)
    """,
    "save": """
        from inferlet import args, available_models, send

        name, prompt = args()
        context = available_models()[0].context(prompt)
        "".join(context.generate(8, stop=[]))
        context.save(name, lease=60)
        for piece in context.generate(8, stop=[]):
            send(piece)
    """,
    "restore": """
        from inferlet import args, available_models, send

        context = available_models()[0].restore(*args())
        for piece in context.generate(8, stop=[]):
            send(piece)
    """,
}


def twin(directory: Path, what: str) -> Path:
    return write_program(directory, f"{what}.py", PYTHON[what])


@pytest.mark.parametrize(
    "options",
    [
        ("40", "0", "1", "1", "1", "0", "nowhere"),
        ("40", "1.2", "1", "7", "1", "0", "nowhere"),
        ("40", "0.9", "0.8", "8", "1.3", "0.5", "nowhere"),
        ("40", "0", "1", "1", "1.2", "1", "nowhere"),
        ("40", "1.5", "1", "9", "1", "0", "e"),
    ],
)
def test_both_languages_say_the_same(
    server: Server, tmp_path: Path, options: tuple[str, ...]
) -> None:
    in_c = launch(server, SUPPORT, "--", "text", PROMPT, *options)
    in_python = launch(server, twin(tmp_path, "text"), "--", PROMPT, *options)
    assert in_c == in_python
    assert in_c and options[-1] not in in_c


@pytest.mark.parametrize("first", ["c", "python"])
def test_each_restores_what_the_other_saved(server: Server, tmp_path: Path, first: str) -> None:
    prompt = PROMPT + " what? " * 20
    if first == "c":
        said = launch(server, SUPPORT, "--", "save", "from c", prompt)
        again = launch(server, twin(tmp_path, "restore"), "--", "from c")
    else:
        said = launch(server, twin(tmp_path, "save"), "--", "from python", prompt)
        again = launch(server, SUPPORT, "--", "restore", "from python")
    assert said == again and said


def test_a_long_prompt_says_the_same_under_any_quota_of_embeds(server: Server) -> None:
    said = [
        launch(server, *quota, SUPPORT, "--", "long", 2000)
        for quota in ((), ("--quota", "embeds=64"))
    ]
    assert said[0] == said[1] and len(said[0].split()) == 8


def test_the_examples_of_the_readme_compile_and_run(server: Server, tmp_path: Path) -> None:
    whole, two, *_ = re.findall(r"```c\n(.*?)```", (C / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.c").write_text(
        whole.replace("int main", two + "\nint main").replace(
            "if (code)", "if (!code)\n        code = answer_twice(context);\n    if (code)", 1
        )
    )
    make(C)
    flags = ["-Wall", "-Wextra", "-Werror", "-static", f"-I{C}"]
    library = str(C / "build" / "libinferlet.a")
    program = tmp_path / "example"
    command = ["gcc", *flags, "-o", str(program), str(tmp_path / "example.c"), library]
    subprocess.run(command, check=True, timeout=100)
    assert launch(server, program, "--", PROMPT).startswith(" Paris")


def test_hidden_tokens_and_a_window_are_what_plain_calls_make_of_them(server: Server) -> None:
    said = launch(server, SUPPORT, "--", "hidden", PROMPT + " and so on, " * 8, 50, 10, 12)
    assert len(said.split()) == 50
