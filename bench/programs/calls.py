"""Times control calls: one at a time, and many in one frame (microseconds a call)."""

from time import monotonic

from inferlet import Model, inferlet


@inferlet
def calls(model: Model, count: int):
    with model.queue() as queue:
        queue.synchronize().result()
        start = monotonic()
        for _ in range(count):
            queue.synchronize().result()
        alone = (monotonic() - start) / count
        start = monotonic()
        futures = [queue.synchronize() for _ in range(count)]
        for future in futures:
            future.result()
        together = (monotonic() - start) / count
        yield f"{alone * 1e6} {together * 1e6}"
