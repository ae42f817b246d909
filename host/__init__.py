if __name__ != "piehost.host":
    raise ImportError(f"import piehost.host, not {__name__}: a second copy would be another module")
