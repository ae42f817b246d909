"""`python -m piehost.host.store --fd N --path FILE`: the store, until its link closes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from pathlib import Path

from piehost.wire.link import Link, LinkClosed
from piehost.wire.services import HostToService

from .database import Database
from .server import Server


def main() -> None:
    parser = argparse.ArgumentParser(prog="piehost.host.store", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited link to the host")
    parser.add_argument("--path", type=Path, required=True, help="the file; made if there is none")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides when to end
    os.umask(0o077)
    link: Link[HostToService] = Link.from_fd(args.fd, HostToService)
    with contextlib.suppress(LinkClosed):
        Server(link, Database(args.path)).run()


if __name__ == "__main__":
    main()
