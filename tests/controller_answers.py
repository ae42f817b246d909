"""What came of what an inferlet asked of the controller."""

from __future__ import annotations

from typing import Any

import pytest
from inferlet import abi, errors

from .controller_process import AnswerError, ControllerProcess, Peer


def outcome(controller: ControllerProcess, peer: Peer, request: int) -> Any:
    """The value, or the error's class."""
    try:
        return controller.wait(peer, request)
    except AnswerError as error:
        return errors.BY_CODE[error.code]


def refused(peer: Peer, command: abi.Command) -> type[errors.InferletError]:
    """The class of the error that the command is answered with."""
    with pytest.raises(AnswerError) as caught:
        peer.ask(command)
    assert caught.value.message and caught.value.hint
    return errors.BY_CODE[caught.value.code]


def settle(controller: ControllerProcess) -> None:
    """Until the controller has carried out what was sent before."""
    for _ in range(3):
        controller.stats()
