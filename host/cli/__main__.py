"""`python -m piehost.host.cli`: the `piehost` command where it is not installed."""

from . import main

main()
