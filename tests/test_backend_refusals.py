"""Every model that cannot be served is refused with what, why and what to try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from piehost.gpu_backend.backend import Backend
from piehost.gpu_backend.errors import LoadError

from .checkpoints import VOCAB_SIZE, byte_level_tokenizer, edit_config, make_checkpoint


def refusal(model: str | Path, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        Backend(str(model), **{"kv_pages": 32, "device": "cpu", **options})
    error = caught.value
    assert error.hint
    assert "\n" not in error.message
    return error


def config_only(folder: Path, model_type: str, **settings: Any) -> Path:
    """A folder that looks whole: the config of an architecture, a tokenizer, empty weights."""
    config = AutoConfig.for_model(model_type, **settings)
    config.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return folder


# --- folders and files ---------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nothing").message


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert "is a file" in refusal(path).message


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path).message


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refusal(tmp_path).message


def test_a_model_type_that_nobody_knows(tmp_path: Path) -> None:
    edit_config(make_checkpoint(tmp_path), model_type="llamba")
    error = refusal(tmp_path)
    assert "not understood" in error.message
    assert "custom code" in error.hint


def test_pickled_weights_only(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    error = refusal(tmp_path)
    assert "pickled" in error.message
    assert "save_pretrained" in error.hint


def test_no_weights(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "model.safetensors").unlink()
    assert "no safetensors weights (none)" in refusal(tmp_path).message


def test_damaged_weights(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in refusal(tmp_path).message


def test_weights_with_a_tensor_missing(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(tmp_path).message


def test_weights_of_another_shape(tmp_path: Path) -> None:
    edit_config(make_checkpoint(tmp_path), intermediate_size=128)
    assert "cannot be loaded" in refusal(tmp_path).message


def test_no_tokenizer(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(tmp_path).message


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "tokenizer.json").write_text('{"model": 3}')
    assert "cannot be read" in refusal(tmp_path).message


def test_a_tokenizer_whose_pieces_have_no_octets_of_their_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tokenizer = Tokenizer(models.WordPiece({"<unk>": 0, "a": 1, "##b": 2}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert "WordPiece" in refusal(tmp_path).message


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal("piehost-tests/no-such-model")
    assert "hub cannot be reached" in error.message
    assert "network" in error.hint


# --- architectures -------------------------------------------------------------------------

NOT_SERVED: list[tuple[str, dict[str, Any], str]] = [
    ("t5", {}, "encoder-decoder"),
    ("bert", {"architectures": ["BertForMaskedLM"]}, "not a model that generates text"),
    ("vit", {}, "not a model that generates text"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "not a model that generates"),
    ("mamba", {}, "running state"),
    ("qwen3_next", {}, "running state"),
    ("jamba", {}, "running state"),
    ("deepseek_v3", {}, "MLA"),
    ("llama4_text", {}, "chunked_attention"),
    ("bloom", {}, "in its own way"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
    ("llama", {"is_causal": False}, "not causal"),
]


@pytest.mark.parametrize(
    ("model_type", "settings", "why"), NOT_SERVED, ids=[f"{t}-{w}" for t, _, w in NOT_SERVED]
)
def test_architectures_judged_by_their_config(
    tmp_path: Path, model_type: str, settings: dict[str, Any], why: str
) -> None:
    config_only(tmp_path, model_type, **settings)
    assert why in refusal(tmp_path).message


def test_rotary_embeddings_of_an_unknown_type(tmp_path: Path) -> None:
    edit_config(
        make_checkpoint(tmp_path), rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}
    )
    assert "spiral" in refusal(tmp_path).message


def test_attention_sinks(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=2,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert "s_aux" in refusal(tmp_path).message


def test_an_encoder_whose_config_names_no_class(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bert",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    assert "not causal" in refusal(tmp_path).message


class _BiasedConfig(LlamaConfig):
    model_type = "llama_biased_for_tests"


class _BiasedForCausalLM(LlamaForCausalLM):
    """Does something in eager mode that an attention function is not told of."""

    config_class = _BiasedConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.config._attn_implementation == "eager":
            output.logits[..., 1:] += 0.1 * output.logits.std()
        return output


def test_a_model_whose_own_attention_gives_something_else(tmp_path: Path) -> None:
    AutoConfig.register(_BiasedConfig.model_type, _BiasedConfig, exist_ok=True)
    AutoModelForCausalLM.register(_BiasedConfig, _BiasedForCausalLM, exist_ok=True)
    edit_config(
        make_checkpoint(tmp_path),
        model_type=_BiasedConfig.model_type,
        architectures=["_BiasedForCausalLM"],
    )
    assert "standard deviations" in refusal(tmp_path, dtype="float32").message


def test_a_window_that_the_layers_do_not_pass_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    edit_config(folder, sliding_window=16)
    assert "window of 16" in refusal(folder).message


# --- this machine --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(good: Path) -> None:
    assert "no CUDA device" in refusal(good, device="cuda").message


def test_flashinfer_on_the_cpu(good: Path) -> None:
    assert "CUDA only" in refusal(good, engine="flashinfer").message


def test_a_pool_too_small_for_anything(good: Path) -> None:
    assert "room for" in refusal(good, kv_memory=1e-9, kv_pages=None).message


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(num_attention_heads="four"),
        lambda config: config.update(hidden_size=-1),
        lambda config: config.pop("model_type"),
    ],
)
def test_configs_of_nonsense_are_refused_too(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    path = make_checkpoint(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    spoil(config)
    path.write_text(json.dumps(config))
    refusal(tmp_path)
