if __name__ != "piehost.controller":
    raise ImportError(
        f"import piehost.controller, not {__name__}: a second copy would be another module"
    )
