"""The contract between piehost's own processes: message types and the link that carries them.

Every message is a tagged msgspec struct; every link is a socketpair made by the parent, so the
death of either end is an end-of-file for the other. Imports nothing of the processes themselves.
"""

if __name__ != "piehost.wire":
    raise ImportError(f"import piehost.wire, not {__name__}: that would be a second copy of it")
