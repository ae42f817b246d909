"""The egress broker: the one process that opens network connections for inferlets.

`grants.py` and `addresses.py` are also what the CLI checks `--egress` with; the rest runs in the
broker's own process, `python -m piehost.host.egress --fd N`.
"""
