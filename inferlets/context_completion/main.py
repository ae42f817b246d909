from inferlet import Model, inferlet


@inferlet
def complete(model: Model, prompt: str, max_tokens: int = 16):
    with model.context(prompt) as ctx:
        yield from ctx.generate(max_tokens=max_tokens)
