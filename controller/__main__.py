"""`python -m piehost.controller --host-fd N --backend-fd M`: started by the host, ends with it."""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal

from tokenizers import Tokenizer

from piehost.wire.control import Configure, HostToController
from piehost.wire.link import Link, LinkClosed
from piehost.wire.step import StepDone

from .loop import Controller


def main() -> None:
    parser = argparse.ArgumentParser(prog="piehost.controller")
    parser.add_argument("--host-fd", type=int, required=True)
    parser.add_argument("--backend-fd", type=int, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the host's to act on
    host: Link[HostToController] = Link.from_fd(args.host_fd, HostToController)
    backend: Link[StepDone] = Link.from_fd(args.backend_fd, StepDone)
    try:
        configure, tokenizer = _configured(host)
        gc.freeze()
        Controller(host, backend, configure, tokenizer).run()
    except LinkClosed:
        pass  # the host is gone, and with it our reason to be


def _configured(host: Link[HostToController]) -> tuple[Configure, Tokenizer]:
    """Waits for the first message. LinkClosed if the host goes before it."""
    poll = select.poll()  # not select(2): the number is the host's, which may have many open
    poll.register(host.fileno(), select.POLLIN)
    while True:
        poll.poll()
        for message, fds in host.receive():
            assert isinstance(message, Configure), "Configure comes first"
            os.lseek(fds[0], 0, os.SEEK_SET)
            with os.fdopen(fds[0], "rb") as file:
                return message, Tokenizer.from_str(file.read().decode())


if __name__ == "__main__":
    main()
