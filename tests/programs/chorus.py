"""Goes on from a prompt when told to, past any end token."""

from inferlet import Model, inferlet, receive, send


@inferlet
def chorus(model: Model, prompt: str, max_tokens: int):
    with model.context(prompt) as context:
        send("ready")
        receive().result()
        yield from context.generate(max_tokens, stop=())
