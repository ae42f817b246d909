"""The store: small values of each user, kept across restarts in one SQLite file.

Its process is `python -m piehost.host.store --fd N --path FILE`.
"""
