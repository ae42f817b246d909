"""The Python support library on a real server and the embedded model, in float32: what a context
generates is what plain forward passes over the same tokens give."""

from __future__ import annotations

from pathlib import Path

import pytest

from piehost.host.client import Client, Result

from .host_harness import write_program

PROGRAMS = Path(__file__).resolve().parent / "programs"
# plain(tokens): the natural logarithms of all next tokens' probabilities, by id, of one forward
# pass over `tokens` without a context
PLAIN = """
    import numpy as np
    from inferlet import *

    model = available_models()[0]

    def plain(tokens):
        with model.queue() as q:
            spans = [tokens[at : at + 500] for at in range(0, len(tokens), 500)]
            kv, at = q.alloc_kv(len(tokens)), 0
            for span in spans:
                inputs = q.embed_txt(span, at)
                out = q.forward(inputs, read=kv[:at], write=kv[at : at + len(span)])
                at += len(span)
                q.synchronize().result()
            dist = q.get_next_dist(out, k=model.vocab_size).result()
            logs = np.empty(model.vocab_size)
            logs[dist.ids] = np.log(np.maximum(dist.probs, 1e-30))
            return logs

    def plain_seeing(tokens, hidden_from):
        # as plain, but token i does not see the tokens of hidden_from[i]; one forward with a mask
        mask = np.tri(len(tokens), dtype=bool)
        for i, hidden in hidden_from.items():
            mask[i, hidden] = False
        with model.queue() as q:
            out = q.forward(q.embed_txt(tokens), mask=mask)
            dist = q.get_next_dist(out, k=model.vocab_size).result()
            logs = np.empty(model.vocab_size)
            logs[dist.ids] = np.log(np.maximum(dist.probs, 1e-30))
            return logs

    def greedy(tokens, count):
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(plain(tokens).argmax()))
        return tokens[-count:]

    PROMPT = model.tokenize("The capital of France is").result()
"""


def run(
    client: Client,
    folder: Path,
    source: str,
    *args: str,
    user: str = "",
    name: str = "main.py",
    **quotas: int,
) -> Result:
    program = write_program(folder, name, PLAIN + source)
    given = {key: str(value) for key, value in quotas.items()}
    result = client.launch(program, args, given, user=user).result()
    assert result.code == 0, (result.reason, result.stdout, result.stderr.decode())
    return result


@pytest.mark.parametrize("seed", [1000, 2000, 3000])
def test_random_operations_on_contexts(client: Client, seed: int) -> None:
    args = ["--seed", str(seed), "--runs", "2", "--steps", "25"]
    result = client.launch(PROGRAMS / "context_fuzz.py", args, {"kv_pages": "120"}).result()
    assert result.code == 0, (result.stdout.decode(), result.stderr.decode())
    assert result.text.startswith("2 runs with ")


@pytest.mark.parametrize(("embeds", "times"), [(2, 20), (64, 200), (1024, 390)])
def test_a_long_prompt_needs_few_embeds(
    client: Client, tmp_path: Path, embeds: int, times: int
) -> None:
    source = """
    import sys
    prompt = PROMPT * int(sys.argv[1])
    if sys.argv[2:] == ["plain"]:
        send(repr(greedy(prompt, 3)))
    else:
        with model.context(prompt) as context:
            send(repr(list(context.generate_tokens(3, stop=[]))))
    """
    few = run(client, tmp_path, source, str(times), embeds=embeds)
    assert few.messages == run(client, tmp_path, source, str(times), "plain").messages


@pytest.mark.parametrize("embeds", [40, 200])
def test_many_long_prompts_at_once_keep_to_the_quota_of_embeds(
    client: Client, tmp_path: Path, embeds: int
) -> None:
    source = """
    contexts = [model.context([3 + n, *PROMPT * (20 + n)]) for n in range(12)]
    texts = generate_all(contexts, 4, stop=[])
    send(repr(texts))
    """
    few = run(client, tmp_path, source, embeds=embeds)
    assert few.messages == run(client, tmp_path, source, embeds=20000).messages


def test_penalties_are_those_of_the_tokens_generated(client: Client, tmp_path: Path) -> None:
    run(
        client,
        tmp_path,
        """
    with model.context(PROMPT * 2) as context:
        options = {"presence_penalty": 8.0, "frequency_penalty": 4.0}
        tokens = list(context.generate_tokens(40, stop=[], **options))
    expected = PROMPT * 2
    for token in tokens:
        logs = plain(expected)
        for other in set(expected[len(PROMPT) * 2 :]):
            logs[other] -= 8.0 + 4.0 * expected[len(PROMPT) * 2 :].count(other)
        assert logs[token] > logs.max() - 1e-3, (expected, token, int(logs.argmax()))
        expected.append(token)
    assert tokens != greedy(PROMPT * 2, 40)
    with model.context(PROMPT) as context:
        harsh = list(context.generate_tokens(20, stop=[], repetition_penalty=1e6))
        assert len({*harsh, *PROMPT}) == 20 + len({*PROMPT})
    """,
    )


def test_constraints_and_samplers_look_at_the_models_own_distribution(
    client: Client, tmp_path: Path
) -> None:
    run(
        client,
        tmp_path,
        """
    import string
    capitals = [" Paris", " Rome", " Berlin", " Madrid"]
    for country, capital in (("France", " Paris"), ("Italy", " Rome"), ("Germany", " Berlin")):
        with model.context(f"The capital of {country} is") as context:
            stream = context.generate(20, constraint=choice(model, capitals))
            assert "".join(stream) == capital and stream.finish_reason == "stop"
            assert context.text == f"The capital of {country} is{capital}"

    allowed = characters(model, string.ascii_uppercase + " ")
    with model.context(PROMPT) as context:
        stream = context.generate_tokens(12, constraint=allowed, stop=[], logprobs=True)
        expected = list(PROMPT)
        for token, told in zip(stream, stream.logprobs):
            logs = plain(expected)
            assert abs(logs[token] - told) < 2e-3, "by the model's own softmax, without the mask"
            expected.append(token)
        assert set(model.detokenize(expected[len(PROMPT) :])) <= set(string.ascii_uppercase + " ")
        mask = np.unpackbits(np.frombuffer(allowed([]), np.uint8), bitorder="little")
        first = plain(PROMPT)
        first[mask[: model.vocab_size] == 0] = -np.inf
        assert expected[len(PROMPT)] == int(first.argmax())

    with model.context(PROMPT) as context:
        stream = context.generate_tokens(
            12, sampler=lambda d: int(d.ids[1]), k=2, stop=[], logprobs=True
        )
        expected = list(PROMPT)
        for token in stream:
            logs = plain(expected)
            assert token == int(logs.argsort()[-2])
            assert abs(logs[token] - stream.logprobs[-1]) < 2e-3
            expected.append(token)
    for sampler in (mirostat(tau=2.0, seed=1), typical(seed=1)):
        with model.context(PROMPT) as context:
            assert len(list(context.generate_tokens(30, sampler=sampler, stop=[]))) == 30
    """,
    )


def test_best_of_is_the_branch_with_the_highest_mean(client: Client, tmp_path: Path) -> None:
    run(
        client,
        tmp_path,
        """
    def mean(tokens):
        logs = [plain(tokens[:i])[tokens[i]] for i in range(len(PROMPT), len(tokens))]
        return sum(logs) / len(logs)

    means = []
    for i in range(4):
        with model.context(PROMPT) as context:
            list(context.generate_tokens(8, temperature=1.5, seed=40 + i))
            means.append(mean(context.tokens))
    with model.context(PROMPT) as context:
        best = best_of(context, 4, 8, temperature=1.5, seed=40)
        assert abs(best.mean_logprob - max(means)) < 2e-3, (best, means)
        assert context.text == "The capital of France is" + best.text
        assert abs(mean(context.tokens) - best.mean_logprob) < 2e-3
        assert list(context.generate_tokens(3, stop=[])) == greedy(context.tokens[:-3], 3)
    assert len(set(means)) > 1
    """,
    )


@pytest.mark.parametrize("how", ["interleaved", "tasks"])
def test_generations_of_one_program_share_steps(client: Client, tmp_path: Path, how: str) -> None:
    source = """
    import asyncio, sys
    prompts = [f"{n} + {n + 3} =" for n in range(8)]
    contexts = [model.context(prompt) for prompt in prompts]
    options = {"max_tokens": 24, "stop": []}

    async def one(context):
        return "".join([piece async for piece in context.generate(**options)])

    async def tasks():
        return await asyncio.gather(*map(one, contexts))

    match sys.argv[1]:
        case "alone":
            texts = ["".join(context.generate(**options)) for context in contexts]
        case "interleaved":
            texts = generate_all(contexts, **options)
        case "tasks":
            texts = asyncio.run(tasks())
    send("\\n".join(texts))
    """
    alone = run(client, tmp_path, source, "alone")
    together = run(client, tmp_path, source, how)
    assert together.messages == alone.messages
    assert together.stats.tokens_out == alone.stats.tokens_out == 8 * 24
    assert together.stats.steps * 3 < alone.stats.steps
    assert together.stats.batch_sum > 3 * together.stats.steps


def test_a_saved_context_is_restored_by_another_inferlet(client: Client, tmp_path: Path) -> None:
    saver = """
    import sys
    with model.context(PROMPT * 30) as context:
        made = list(context.generate_tokens(9, stop=[]))
        context.save("prefix", lease=float(sys.argv[1]))
        rest = list(context.generate_tokens(9, stop=[]))
    send(repr((PROMPT * 30 + made, rest)))
    """
    restorer = """
    context = model.restore("prefix")
    send(repr((context.tokens, list(context.generate_tokens(9, stop=[])))))
    unsave("prefix")
    """
    saved = run(client, tmp_path, saver, "60", user="ada")
    assert run(client, tmp_path, saver, "60", user="bob").code == 0, "names are each user's own"
    restored = run(client, tmp_path, restorer, user="ada")
    assert restored.messages == saved.messages
    assert restored.stats.tokens_in == 9, "nothing but the last token is computed again"
    gone = """
    try:
        model.restore("prefix")
    except NotFoundError as error:
        send(error.hint)
    """
    assert run(client, tmp_path, gone, user="ada").messages
    assert not run(client, tmp_path, gone, user="bob").messages


def test_a_saved_context_is_what_the_page_says(client: Client, tmp_path: Path) -> None:
    """Written and read by hand, as another language does."""
    run(
        client,
        tmp_path,
        """
    import struct
    tokens = PROMPT * 9
    with model.context(tokens) as context:
        context.save("ours")
    with model.queue() as q:
        imported = q.import_kvpage("ours").result()
        octets = b"".join(t.to_bytes(3, "little") for t in tokens)
        n = len(tokens)
        assert imported.meta == b"PIEC" + struct.pack("<BIII", 1, 1, n, n) + octets
        # 20 tokens fewer are written, and there are pages to spare
        kv = q.alloc_kvpage(8)
        q.forward(q.embed_txt(tokens[:-20]), write=kv[: n - 20], outputs=0)
        meta = b"PIEC" + struct.pack("<BIII", 1, 1, n, n - 20) + octets
        q.export_kvpage("theirs", kv, meta=meta).result()
    for name in ("ours", "theirs"):
        with model.restore(name) as context:
            assert list(context.generate_tokens(5, stop=[])) == greedy(tokens, 5), name
    """,
        user="pat",
    )


SCENES = {
    "a hidden last token sees itself, and is shown again": """
        context = model.context(FIRST)
        context.mask(6, 40)
        context.fill(MORE)
        context.mask(6, 40, visible=True)
        hidden = {i: list(range(6, min(i, 40))) for i in range(39, 44)}
    """,
    "the last token after a trim is computed with what follows": """
        context = model.context(FIRST)
        list(context.generate_tokens(1))
        context.mask(2, 8)
        context.trim(12)
        context.fill(MORE)
        hidden = {i: list(range(2, 8)) for i in range(11, 17)}
    """,
    "a step of a sampler that nobody waited for": """
        context = model.context(FIRST)
        stream = context.generate_tokens(9, sampler=lambda d: d.argmax(), stop=[])
        next(stream)
        stream.ahead()
        context.fill(MORE)
        hidden = {}
    """,
    "after a failure hidden tokens are hidden from all": """
        context = model.context(FIRST)
        list(context.generate_tokens(1))
        context.mask(3, 6)
        context.evict(16, 32)
        with model.queue() as hog:
            all_of_them = hog.alloc_kvpage(int(quota().result()["kv_pages"]))
            hog.synchronize().result()
            context.fill(MORE * 40)
            try:
                list(context.generate_tokens(3))
            except QuotaError:
                pass
            else:
                raise AssertionError
        gone = [3, 4, 5, *range(16, 32)]
        hidden = {i: [j for j in gone if j < i] for i in range(4, len(context))}
    """,
}


@pytest.mark.parametrize("scene", SCENES)
def test_who_sees_whom(client: Client, tmp_path: Path, scene: str) -> None:
    source = """
    FIRST, MORE = [5 + 7 * i for i in range(40)], [900, 31, 77, 1500, 12]
    SCENE
    tokens, dists = context.tokens, []
    sampler = lambda dist: dists.append(dist.copy())
    list(context.generate_tokens(1, sampler=sampler, k=model.vocab_size))
    logs = np.empty(model.vocab_size)
    logs[dists[0].ids] = np.log(np.maximum(dists[0].probs, 1e-30))
    likely = dists[0].ids[:100]
    assert abs(logs - plain_seeing(tokens, hidden))[likely].max() < 5e-3
    assert not hidden or abs(logs - plain(tokens))[likely].max() > 0.02, "it makes a difference"
    """
    lines = "\n".join(line[4:] for line in SCENES[scene].splitlines())
    run(client, tmp_path, source.replace("    SCENE", lines))


def test_a_generation_given_up_before_its_first_token(client: Client, tmp_path: Path) -> None:
    source = """
    prompt = PROMPT * 150
    with model.context(prompt) as context:
        stream = context.generate_tokens(50)
        stream.ahead()
        flush()
        stream.close()
        assert context.tokens == prompt and stream.finish_reason == "closed"
        assert list(context.generate_tokens(3, stop=[])) == greedy(prompt, 3)
    """
    run(client, tmp_path, source)


def test_a_window_keeps_a_long_text_in_few_pages(client: Client, tmp_path: Path) -> None:
    source = """
    with model.context(PROMPT) as context:
        context.window(sink=4, recent=64)
        most = 0
        for token in context.generate_tokens(600, stop=[], temperature=1.0, seed=1):
            most = max(most, context.stats.pages)
        # 68 tokens are 5 pages and one at either end, and some are ahead
        assert len(context) == 600 + len(PROMPT) and most <= 12, most
        assert context.hidden == [(4, len(context) - 65)]
    """
    run(client, tmp_path, source, kv_pages=12)


def test_running_out_of_pages_leaves_every_context_usable(client: Client, tmp_path: Path) -> None:
    source = """
    first, second = model.context(PROMPT), model.context(PROMPT * 2)
    try:
        generate_all([first, second], 400, stop=[])
    except QuotaError as error:
        assert error.hint
    else:
        raise AssertionError
    for context, prompt in ((first, PROMPT), (second, PROMPT * 2)):
        assert context.tokens[: len(prompt)] == prompt
        context.trim(len(prompt))
        assert list(context.generate_tokens(6, stop=[])) == greedy(prompt, 6)
    """
    run(client, tmp_path, source, kv_pages=16)
