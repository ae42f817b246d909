"""What a model says of itself, and its chat template."""

from __future__ import annotations

from typing import Any

import pytest
from inferlet import (
    ArgumentError,
    TraitError,
    abi,
)
from scripted import Host
from scripted_device import (
    HIDDEN_SIZE,
)


def test_what_a_model_is(host: Host) -> None:
    model = host.model
    assert (model.hidden_size, model.architecture) == (HIDDEN_SIZE, "Scripted")
    assert model.prompt_template == model.chat_template == "{{ messages }}"
    assert model.has_trait("OutputEmbed") and not model.has_trait("InputImage")
    assert model.info.vocab_size == model.vocab_size


def test_chat(host: Host) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "\u00e9"}]
    assert bytes(host.model.chat(messages).result()) == "[system]a[user]\u00e9[assistant]".encode()
    assert bytes(host.model.chat(messages[:1], False).result()) == b"[system]a"
    with pytest.raises(ArgumentError, match="refuses"):
        host.model.chat([{"role": "judge", "content": ""}]).result()
    with pytest.raises(TraitError):
        host.model.chat([]).result()


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        {"role": "user", "content": "hi"},
        ["hi"],
        5,
        [{"role": "user", "content": object()}],
        [{"role": "user", "content": "x" * 70000}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_chats_that_are_none_are_refused_here(host: Host, messages: Any) -> None:
    with pytest.raises(ArgumentError):
        host.model.chat(messages)
    host.settle()
    assert not host.controller.of(abi.Chat)
