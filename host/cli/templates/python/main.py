"""Continues a prompt and streams the text as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from inferlet import Model, inferlet


@inferlet
def main(model: Model, prompt: str, max_tokens: int = 64) -> Iterator[str]:
    """Continues a prompt until the model ends it."""
    with model.context(prompt) as context:
        yield from context.generate(max_tokens)
