"""Continues a prompt and streams the text as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from inferlet import Model, inferlet


@inferlet
def text_completion(
    model: Model,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Continues a prompt until the model ends it. Greedy unless --temperature is given."""
    with model.context(prompt) as context:
        yield from context.generate(max_tokens, temperature=temperature, top_p=top_p, seed=seed)
