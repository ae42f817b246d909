"""Greedy output in float32 equals transformers' own `generate`, alone and in mixed batches."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from piehost.gpu_backend.backend import Backend

from .checkpoints import VOCAB_SIZE, make_checkpoint
from .step_driver import StepDriver

NEW_TOKENS = 64
LENGTHS = (1, 7, 16, 33, 70)  # of the prompts: within, at and across pages, chunks and windows
# seeds whose greedy choices are clear (checked below) and whose output is no loop
SEEDS = {"llama": 6, "qwen2": 1, "qwen3": 0, "mistral": 0, "gemma2": 4, "gemma3": 4, "phi3": 0}


@dataclass
class Case:
    backend: Backend
    prompts: list[list[int]]
    expected: list[list[int]]

    def driver(self, chunk: int) -> StepDriver:
        return StepDriver(self.backend.run, self.backend.pool.page_size, chunk)


@pytest.fixture(scope="module", params=sorted(SEEDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    folder = make_checkpoint(tmp_path_factory.mktemp(name), name, seed=SEEDS[name])
    backend = Backend(str(folder), device="cpu", dtype="float32", kv_pages=512)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCAB_SIZE, n).tolist() for n in LENGTHS]
    return Case(backend, prompts, [reference(folder, prompt) for prompt in prompts])


def reference(folder: Path, prompt: list[int]) -> list[int]:
    """transformers' greedy tokens; each choice must be clear, or equality would be luck."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for logits in output.logits:
        first, second = logits[0].topk(2).values
        assert first - second > 1e-3 * logits[0].std()
    tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
    assert len(set(tokens)) > 8
    return tokens


def test_each_prompt_alone(case: Case) -> None:
    driver = case.driver(chunk=256)
    for prompt, expected in zip(case.prompts, case.expected, strict=True):
        sequence = driver.add(prompt, NEW_TOKENS)
        driver.generate([sequence], NEW_TOKENS)
        assert sequence.output == expected


def test_all_prompts_in_one_ragged_batch_with_chunked_prefill(case: Case) -> None:
    driver = case.driver(chunk=9)
    sequences = [driver.add(prompt, NEW_TOKENS) for prompt in case.prompts]
    driver.generate(sequences, NEW_TOKENS)
    assert [s.output for s in sequences] == case.expected


def test_a_mixed_batch_of_32_that_sequences_join_as_it_runs(case: Case) -> None:
    driver = case.driver(chunk=20)
    random = np.random.default_rng(1)
    running = [
        driver.add(random.integers(3, VOCAB_SIZE, random.integers(1, 60)).tolist(), 2 * NEW_TOKENS)
        for _ in range(32 - len(case.prompts))
    ]
    joining = [driver.add(prompt, NEW_TOKENS) for prompt in case.prompts]
    watched = list(joining)
    while any(len(s.output) < NEW_TOKENS for s in watched):
        if joining and len(running) < 32:
            running.append(joining.pop())
        driver.step([s for s in running if len(s.output) < NEW_TOKENS])
    assert [s.output for s in watched] == case.expected


def test_the_default_dtype_of_a_small_model_is_exact(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype="bfloat16")
    assert Backend(str(folder), kv_pages=16).loaded.dtype == torch.float32
    assert Backend(str(folder), kv_pages=16, dtype="bfloat16").loaded.dtype == torch.bfloat16


def test_longrope_stops_where_its_frequencies_would_change(tmp_path: Path) -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [4.0] * 8,
    }
    folder = make_checkpoint(
        tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=96
    )
    assert Backend(str(folder), kv_pages=16).info.max_context == 96
    assert Backend(str(folder), kv_pages=16, max_context=64).info.max_context == 64


def test_the_package_is_imported_under_one_name_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import gpu_backend"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "import piehost.gpu_backend" in done.stderr
