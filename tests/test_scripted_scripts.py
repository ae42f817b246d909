"""What a scripted model says: the texts of its script to their end, nonsense where none matches."""

from __future__ import annotations

from pathlib import Path

import pytest

from piehost.gpu_backend.scripted import ScriptedBackend

from .scripted_backend import PAGE, TOKENIZER, TWO, backend_of, encode, said
from .scripted_backend import unscripted as unscripted
from .step_driver import StepDriver


@pytest.mark.parametrize(
    ("script", "prompt", "text"),
    [
        (TWO, "Q: name?\nA:", " My name is Pie."),  # the longer `after`
        (TWO, "Q: late?\nA:", " Yes."),
        (TWO, "Q: late?\nA: Yes.\nQ: name?\nA:", " My name is Pie."),
        (TWO, "Q: name?\nA: My name", " is Pie."),  # it goes on with what was begun
        (TWO, "Q: name?\nA: My name is Pie.", ""),  # and says it once
        (TWO + '[[say]]\nafter = "A:"\ntext = " No."', "Q: late?\nA:", " No."),  # the later one
        (TWO + '[otherwise]\ntext = " What?"', "Hello", " What?"),
        (TWO + '[otherwise]\ntext = " What?"', "Hello What", "?"),
        (TWO + '[otherwise]\ntext = " What?"', "Q: late?\nA:", " Yes."),
        ('[[say]]\nafter = "one"\ntext = " one two one two"', "one", " one two one two"),
        ('[[say]]\nafter = "user\\nHi\\nassistant\\n"\ntext = "Hello!"', "CHAT", "Hello!"),
        (
            '[[say]]\nafter = "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n"\n'
            'text = "Hello!<|im_end|>"',
            "CHAT",
            "Hello!",
        ),
        ('[[say]]\nafter = "snow"\ntext = " \\u2603\\U0001F600"', "snow", " \u2603\U0001f600"),
        ('[[say]]\nafter = "Hush"\ntext = ""', "Hush", ""),
    ],
)
def test_it_says_what_the_script_says(tmp_path: Path, script: str, prompt: str, text: str) -> None:
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokens = said(backend_of(tmp_path, script), encode(chat if prompt == "CHAT" else prompt))
    assert TOKENIZER.decode(tokens) == text


def test_an_end_token_in_the_text_is_the_end(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, '[[say]]\nafter = "Hi"\ntext = " you<|im_end|>"')
    driver = StepDriver(backend.run, PAGE)
    sequence = driver.add(encode("Hi"), 8)
    driver.generate([sequence], len(encode(" you")) + 2)
    assert sequence.output == encode(" you<|im_end|><|im_end|>")


def test_without_a_rule_it_says_something_without_end(unscripted: ScriptedBackend) -> None:
    first, second = (said(unscripted, encode(text), 30) for text in ("Hello", "Hallo"))
    assert len(first) == len(second) == 30  # no end token came
    assert first != second


def test_the_built_in_script_says_what_the_embedded_model_would() -> None:
    backend = ScriptedBackend("scripted")
    assert TOKENIZER.decode(said(backend, encode("The capital of France is"))) == " Paris."
    assert "scripted model" in TOKENIZER.decode(said(backend, encode("Hello")))
