"""The tokenizer: byte-level BPE in which every digit and every newline is a token of its own.

The pre-tokenizer cuts text into newlines, single digits, words with one leading space, runs of
punctuation with one leading space, and single spaces; merges never cross those cuts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from default_model.documents import END_OF_TEXT, TURN_END, TURN_START

PAD = "<|pad|>"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END, PAD]  # ids 0 to 3, in this order
PIECES = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"

# `tools` may be OpenAI-shaped ({"function": {"name": ...}}), flat ({"name": ...}) or plain names;
# an assistant message may carry `tool_calls` in place of content.
CHAT_TEMPLATE = """\
{%- set names = namespace(line='') -%}
{%- for tool in tools or [] -%}
{%- set name = tool if tool is string else (tool.function or tool).name -%}
{%- set names.line = names.line + (', ' if names.line else 'Tools: ') + name -%}
{%- endfor -%}
{%- set first_is_system = messages and messages[0].role == 'system' -%}
{%- if names.line and not first_is_system -%}
{{- '<|im_start|>system\\n' + names.line + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content or [] -%}
{{- part.text or '' -}}
{%- endfor -%}
{%- endif -%}
{%- if loop.first and first_is_system and names.line -%}
{{- ('\\n' if message.content else '') + names.line -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
{{- '{"name": "' + call.name + '", "arguments": ' + arguments + '}' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Learn `vocabulary` tokens (special ones included) from the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = wrapper(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        padding_side="left",
    )
    return tokenizer
