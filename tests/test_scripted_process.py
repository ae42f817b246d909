"""A scripted model as a backend process and behind `piehost`; scripts and options it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from piehost.gpu_backend.vocabulary import load_vocabulary
from piehost.wire.step import LoadFailed, Ready

from .backend_process import BackendProcess
from .host_harness import Terminal, write_program
from .scripted_backend import FOLDER, TOKENIZER, VOCAB, encode
from .step_driver import StepDriver

EOS = 0


def test_the_process_starts_without_torch_and_says_what_it_is() -> None:
    backend = BackendProcess("scripted", "--page-size", "8", "--kv-pages", "32")
    ready, fds = backend.started()
    assert isinstance(ready, Ready)
    assert (ready.pages, ready.device, ready.engine) == (32, "cpu", "scripted")
    assert (ready.model.name, ready.model.page_size, ready.model.vocab_size) == (
        "scripted",
        8,
        VOCAB,
    )
    assert (ready.model.bos_token, ready.model.eos_tokens) == (EOS, [0, 2])
    maps = Path(f"/proc/{backend.process.pid}/maps").read_text()
    assert "tokenizers" in maps and "torch" not in maps
    table, tokenizer = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
    embedded = load_vocabulary(FOLDER, VOCAB)
    assert (table, json.loads(tokenizer)) == (embedded.table, json.loads(embedded.tokenizer_json))
    assert ready.model.chat_template == embedded.chat_template
    driver = StepDriver(lambda step: backend.run(step)[0], 8)
    sequence = driver.add(encode("The capital of France is"), 3)
    driver.generate([sequence], 3)
    assert TOKENIZER.decode(sequence.output) == " Paris."
    backend.close()
    assert backend.process.returncode == 0


def test_served_to_clients_that_name_the_same_script(terminal: Terminal, tmp_path: Path) -> None:
    script = tmp_path / "script.toml"
    script.write_text('[[say]]\nafter = "Who?"\ntext = " Me."\n')
    program = write_program(
        tmp_path,
        "ask.py",
        """
        from inferlet import Model, inferlet

        @inferlet
        def ask(model: Model, prompt: str):
            with model.context(prompt) as context:
                yield from context.generate(8)
        """,
    )
    with terminal.server("--model", f"scripted:{script}") as server:
        here = ("launch", "--socket", server.socket, program, "--model")
        relative = os.path.relpath(script)
        done = terminal.run(*here, f"scripted:{relative}", "--", "--prompt", "Who?", check=0)
        assert done.stdout == b" Me.\n"
        done = terminal.run(*here, "scripted", "--", "--prompt", "Who?", check=125)
        assert b"was started otherwise" in done.stderr


def test_programs_compute_on_its_vectors(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(
        tmp_path,
        "vectors.py",
        """
        from inferlet import Model, inferlet

        @inferlet
        def main(model: Model):
            queue, prompt = model.queue(), model.tokenize("The capital of France is").result()
            hidden = queue.forward(queue.embed_txt(prompt))
            plain = queue.sample(hidden).result()
            back = queue.write_emb(queue.read_emb(hidden).result(), [len(prompt) - 1])
            yield model.detokenize([plain, queue.sample(back).result()])
            embeddings = queue.read_emb(queue.embed_txt(prompt)).result()
            again = queue.forward(queue.write_emb(embeddings))
            yield model.detokenize([queue.sample(again).result()])
        """,
    )
    done = terminal.run("launch", "--model", "scripted", program, check=0)
    assert done.stdout == b" Paris Paris Paris\n"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("[[say]\n", "]"),
        ("[[say]]\nafter = 'a'", "text"),
        ("[[say]]\nafter = 'a'\ntext = 'b'\nbefore = 'c'", "before"),
        ("[[say]]\nafter = 1\ntext = 'b'", "after"),
        ("[[say]]\nafter = ''\ntext = 'b'", "otherwise"),
        ("[[say]]\nafter = '<|im_end|>'\ntext = 'b'", "control tokens"),
        ("[[otherwise]]\ntext = 'b'", "otherwise"),
        (b"\xff\xfe", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_script_is_refused_with_the_reason(
    tmp_path: Path, script: str | bytes | None, says: str
) -> None:
    path = tmp_path / "script.toml"
    if script is not None:
        path.write_bytes(script.encode() if isinstance(script, str) else script)
    backend = BackendProcess(f"scripted:{path}")
    failed, _ = backend.started()
    assert isinstance(failed, LoadFailed)
    assert says in failed.message + failed.hint
    assert failed.hint
    assert backend.process.wait(30) == 1
    assert b"Traceback" not in backend.process.communicate()[1]
    backend.close()


@pytest.mark.parametrize(
    ("model", "options"), [("scripted:", ()), ("scripted", ("--device", "cuda"))]
)
def test_what_a_scripted_model_cannot_be(model: str, options: tuple[str, ...]) -> None:
    backend = BackendProcess(model, *options)
    failed, _ = backend.started()
    assert isinstance(failed, LoadFailed) and failed.hint
    backend.close()
