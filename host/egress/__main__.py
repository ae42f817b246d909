"""`python -m piehost.host.egress --fd N`: the egress broker, until its link to the host closes."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal

from piehost.wire.link import Link
from piehost.wire.services import HostToService

from .broker import Broker


async def _serve(fd: int) -> None:
    await Broker(Link.from_fd(fd, HostToService)).serve()


def main() -> None:
    parser = argparse.ArgumentParser(prog="piehost.host.egress", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited link to the host")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides when to end
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_serve(args.fd))
    os._exit(0)  # threads that wait for a name server would hold up the usual end


if __name__ == "__main__":
    main()
