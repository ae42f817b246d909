if __name__ != "piehost.host":
    raise ImportError(f"import piehost.host, not {__name__}: that would be a second copy of it")
