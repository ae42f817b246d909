"""`chat` is transformers' apply_chat_template, id for id; hostile messages cost a bounded part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from inferlet import abi, errors
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from piehost.gpu_backend.checkpoint import find_checkpoint

from .controller_answers import refused
from .controller_process import AnswerError, ControllerProcess, Peer

TOKENIZER: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
    find_checkpoint("default"), local_files_only=True
)

# Written after the templates of these families.
TEMPLATES = {
    "llama-3": """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{% endif %}
{{'<|im_start|>' + message['role'] + '\\n'}}{% generation %}{{ message['content'] }}\
{% endgeneration %}{{ '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|im_start|>assistant\\n' }}
{% endif %}
""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not message.tool_calls is defined %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must \
alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {%- continue %}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
""",
}
TEMPLATES["default"] = TOKENIZER.chat_template

CALL = {
    "id": "123456789",
    "function": {"name": "look_up", "arguments": {"q": "a<b & 'c'", "n": [1, 2.5, None, True]}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello there"}],
    "system": [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "What is 2 + 2?\n"},
        {"role": "assistant", "content": " 4 "},
        {"role": "user", "content": "Grüße, 世界 \U0001f600 <|im_end|> <b>&amp;</b>"},
    ],
    "tools": [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ],
}


def started(name: str | None, **options: Any) -> ControllerProcess:
    return ControllerProcess(
        tokenizer=TOKENIZER.backend_tokenizer.to_str().encode(),
        chat_template=None if name is None else TEMPLATES.get(name, name),
        **options,
    )


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, Peer]]:
    """An inferlet for each template."""
    special = {k: str(v) for k, v in TOKENIZER.special_tokens_map.items()}
    processes = {name: started(name, special_tokens=special) for name in TEMPLATES}
    yield {name: process.admit()[1] for name, process in processes.items()}
    for process in processes.values():
        process.close()


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_equals_transformers(
    peers: dict[str, Peer], template: str, chat: str, prompt: bool
) -> None:
    messages = CHATS[chat]
    for _ in range(2):  # once more if the day changed in between
        expected = TOKENIZER.apply_chat_template(
            messages,
            chat_template=TEMPLATES[template],
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=False,
        )
        peer = peers[template]
        got = peer.ask(abi.Chat(peer.request(), 0, messages, prompt))
        if got == expected:
            break
    assert got == expected
    assert got


def test_what_a_template_refuses_is_a_wrong_argument_with_its_reason(
    peers: dict[str, Peer],
) -> None:
    peer = peers["mistral"]
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(AnswerError) as caught:
        peer.ask(abi.Chat(1, 0, twice))
    assert caught.value.code == errors.ArgumentError.code
    assert "conversation roles must alternate" in caught.value.message


WRONG: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "no role": [{"content": "x"}],
    "no content": [{"role": "user"}],
    "content is a number": [{"role": "user", "content": 5}],
    "content is nested": [{"role": "user", "content": [[[{}]]]}],
    "role is a map": [{"role": {}, "content": "x"}],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("template", TEMPLATES)
def test_odd_messages_are_answered_one_way_or_the_other(
    peers: dict[str, Peer], template: str, wrong: str
) -> None:
    peer = peers[template]
    request = peer.request()
    peer.put(abi.Chat(request, 0, WRONG[wrong]))
    try:
        assert isinstance(peer.wait(request), list)
    except AnswerError as error:
        assert error.code == errors.ArgumentError.code and error.message and error.hint
    right = peer.ask(abi.Chat(peer.request(), 0, CHATS["one"]))
    assert right[-1:], "and the next one is fine"
    if wrong in ("none", "no role", "no content"):
        assert refused(peer, abi.Chat(peer.request(), 0, WRONG[wrong])) is errors.ArgumentError


def test_a_model_without_a_template_lacks_the_trait() -> None:
    controller = started(None)
    _, peer = controller.admit()
    assert refused(peer, abi.Chat(1, 0, CHATS["one"])) is errors.TraitError
    assert refused(peer, abi.Chat(2, 1, CHATS["one"])) is errors.ArgumentError
    controller.close()


def test_the_tokenizer_adds_no_special_tokens_of_its_own() -> None:
    """Templates write them. This one would begin every text with one."""
    tokenizer = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    bos = TOKENIZER.bos_token_id
    tokenizer.post_processor = TemplateProcessing(
        single=f"{TOKENIZER.bos_token} $A", special_tokens=[(TOKENIZER.bos_token, bos)]
    )
    controller = ControllerProcess(
        tokenizer=tokenizer.to_str().encode(), chat_template=TEMPLATES["chatml"]
    )
    _, peer = controller.admit()
    assert peer.ask(abi.Tokenize(1, 0, "Hello"))[0] == bos
    assert bos not in peer.ask(abi.Chat(2, 0, CHATS["one"]))
    controller.close()


LOOP = "{% for m in messages %}"
HOSTILE = {
    "does not parse": ("{% for %}", errors.TraitError),
    "writes for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        errors.ArgumentError,
    ),
    "runs for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        errors.ArgumentError,
    ),
    "writes for ever where nobody sees it": (
        "{% set ns = namespace(x='') %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% set ns.x = ns.x + 'x' %}{% endfor %}{% endfor %}",
        errors.ArgumentError,
    ),
    "reaches for Python": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        errors.ArgumentError,
    ),
    "hides attributes in a namespace": (
        "{% set ns = namespace(__class__=1) %}",
        errors.ArgumentError,
    ),
    "divides by zero": ("{{ 1 // 0 }}", errors.ArgumentError),
    "calls nothing": ("{{ nothing() }}", errors.ArgumentError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_template_is_an_error_and_nobody_waits_for_it(name: str) -> None:
    template, error = HOSTILE[name]
    controller = started(template)
    _, peer = controller.admit()
    assert refused(peer, abi.Chat(1, 0, CHATS["one"])) is error
    assert refused(peer, abi.Chat(2, 0, CHATS["one"])) is error
    assert peer.ask(abi.Tokenize(3, 0, "fine", False))
    controller.close()


def test_what_a_frame_of_messages_may_become_is_bounded() -> None:
    """Each message contains all of them."""
    controller = started(LOOP + "{{ messages | tojson }}{% endfor %}")
    _, peer = controller.admit()
    many = [{"role": "user", "content": "x" * 40}] * 1000
    with pytest.raises(AnswerError, match="65536 characters"):
        peer.ask(abi.Chat(1, 0, many))
    assert peer.ask(abi.Chat(2, 0, many[:2]))
    controller.close()


def test_nested_messages_are_bounded_by_depth() -> None:
    controller = started(LOOP + "{{ m.content | tojson }}{% endfor %}")
    _, peer = controller.admit()
    content: Any = "x"
    for _ in range(400):
        content = [content]
    assert len(peer.ask(abi.Chat(1, 0, [{"role": "user", "content": content}]))) > 100
    deep = b"\x91" * 60000 + b"\xc0"
    body = b"\x91\x94\x33\x02\x00\x91\x82\xa4role\xa4user\xa7content" + deep
    peer.sock.sendall(abi.frame_header(len(body)) + body)
    with pytest.raises(EOFError):
        peer.wait(2)
    _, other = controller.admit()
    assert other.ask(abi.Tokenize(1, 0, "fine", False))
    controller.close()


def test_a_chat_whose_tokens_do_not_fit_an_answer_is_refused(peers: dict[str, Peer]) -> None:
    peer = peers["default"]
    chat = [{"role": "user", "content": "\u4e16 1 " * 9000}]
    assert len(json.dumps(chat, ensure_ascii=False).encode()) < 65000
    assert refused(peer, abi.Chat(peer.request(), 0, chat)) is errors.ArgumentError
