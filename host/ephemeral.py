"""A host for one `piehost launch`: started here, ended with us, however we end."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from types import TracebackType

from .client import Client
from .options import Options, encode
from .rundir import ephemeral_socket

_CLOSE_SECONDS = 20.0


class EphemeralHost:
    """Starts a host and connects to it. Its stderr is ours with `debug`, else thrown away."""

    def __init__(self, options: Options, debug: bool = False) -> None:
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        path = ephemeral_socket(name)
        self._lifeline, theirs = socket.socketpair()
        module = [sys.executable, "-P", "-m", "piehost.host.server"]
        arguments = ["--ephemeral", name, "--lifeline", str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*module, *arguments, "--options", encode(options)],
            stdin=subprocess.DEVNULL,
            stdout=2 if debug else subprocess.DEVNULL,
            stderr=None if debug else subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches us; we tell it
        )
        theirs.close()
        self.client = Client(path, self._process.pid)

    def __enter__(self) -> EphemeralHost:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the host and all it runs; returns when everything is gone."""
        self.client.close()
        self._lifeline.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
