if __name__ != "piehost.gpu_backend":
    raise ImportError(f"import piehost.gpu_backend, not {__name__}: that would be a second copy of it")
