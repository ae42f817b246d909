"""Generates when told to and says when its first and last token came (seconds, monotonic)."""

from time import monotonic

from inferlet import Model, inferlet, receive, send


@inferlet
def clock(model: Model, prompt_tokens: int, new_tokens: int):
    with model.context([10 + i % 200 for i in range(prompt_tokens)]) as context:
        send("ready")
        receive().result()
        start = monotonic()
        first = last = start
        for i, _ in enumerate(context.generate_tokens(new_tokens, stop=())):
            last = monotonic()
            if i == 0:
                first = last
        yield f"{start} {first} {last}"
