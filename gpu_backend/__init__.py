if __name__ != "piehost.gpu_backend":
    raise ImportError(
        f"import piehost.gpu_backend, not {__name__}: a second copy would be another module"
    )
