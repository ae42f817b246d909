"""The explicit calls, with the names of Pie (SOSP'25, Table 1 and section 4.2), on a queue.

Every call queues a command and returns at once. An error stops the queue: the futures of later
commands fail with it, until `synchronize` has reported it (`docs/abi.md` section 5).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import TYPE_CHECKING, SupportsIndex

from .abi import Forward
from .checks import U32_MAX, integer, position, wrong_type
from .command_queue import CommandQueue
from .errors import MaskError, SpanError
from .exports import ExportCalls
from .inputs import InputCalls
from .outputs import OutputCalls
from .spans import Embeds, KvSpan, check_span

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Queue(InputCalls, OutputCalls, ExportCalls):
    """Commands in order, each as if carried out before the next; `with` destroys it at the end.

    Destroying it cancels what has not run and frees all that was made through it.
    """

    def forward(
        self,
        inputs: Embeds,
        *,
        read: KvSpan | Iterable[KvSpan] = (),
        write: KvSpan | None = None,
        outputs: Embeds | int = 1,
        positions: Iterable[SupportsIndex] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> Embeds:
        """One forward pass over `inputs` (tokens of `embed_txt`, vectors of `write_emb` or of an
        earlier `forward`), which attend to the slots of `read` and to each other.

        `write`, as long as `inputs`, receives their keys and values; None keeps none. `outputs`
        is how many of the last inputs become hidden states in place, or other embeds to put that
        many into; those embeds are returned. `positions` replace those of the embeds. `mask`,
        bool of shape (inputs, slots of `read` + inputs), decides alone who attends to what;
        MaskError if its shape is another. On the queue: every error of `docs/abi.md` section 9.
        """
        check_span(inputs, Embeds)
        spans = [read] if isinstance(read, KvSpan) else list(read)
        spans = [span for span in spans if len(check_span(span, KvSpan))]
        if not isinstance(outputs, Embeds):
            count = integer("the number of outputs", outputs, U32_MAX, "0 or more")
            if count > len(inputs):
                raise SpanError(
                    f"{count} outputs of {len(inputs)} inputs", "ask for at most one an input"
                )
            outputs = inputs[len(inputs) - count :]
        if positions is not None and not isinstance(positions, Iterable):
            raise wrong_type("positions", positions, "a list of one position for each input")
        self._connection.append(
            Forward(
                None,
                self.number,
                inputs.wire,
                [span.wire for span in spans],
                check_span(write, KvSpan).wire if write is not None else None,
                outputs.wire if len(outputs) else None,
                None if positions is None else [position(p) for p in positions],
                None if mask is None else _pack_mask(mask, inputs, spans),
            )
        )
        return outputs


# Python's own errors name a method by the class that defines it, and programs know only `Queue`
for _part in [part for part in Queue.__mro__ if issubclass(part, CommandQueue)]:
    for _name, _member in vars(_part).items():
        if isinstance(_member, FunctionType):
            _member.__qualname__ = f"Queue.{_name}"


def _pack_mask(mask: NDArray[np.bool_], inputs: Embeds, read: list[KvSpan]) -> bytes:
    """Rows of bits, least significant first, each padded to a whole octet."""
    import numpy as np  # only masks need it here, and it is slow to import

    array = np.asarray(mask)
    shape = (len(inputs), sum(map(len, read)) + len(inputs))
    if array.shape != shape:
        raise MaskError(
            f"the mask has shape {array.shape}, {shape} is needed",
            "give a row for each input; a column for each slot read, then for each input",
        )
    return np.packbits(array.astype(np.bool_), axis=1, bitorder="little").tobytes()
