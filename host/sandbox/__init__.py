"""The sandbox of inferlets: what they may do (`policies/`), how the kernel is told (`bpf.py`,
`landlock.py`), the process that starts them (`launcher.py`), and proof that it holds (`probe.py`).
"""

if __name__ != "piehost.host.sandbox":
    raise ImportError(
        f"import piehost.host.sandbox, not {__name__}: a second copy would be another module"
    )
