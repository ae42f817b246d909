"""What the embedded default model is taught, and how it is trained, scored and written.

Run by `scripts/train_default_model.py` and by `tests/test_default_model.py`; knows nothing of
piehost itself. One file per kind of text; every text is drawn from a seed, nothing is downloaded.
"""
