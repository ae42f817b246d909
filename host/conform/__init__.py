"""`piehost conform`: does a program keep the rules of docs/abi.md?

It is run many times, each time in another weather (`weathers.py`): its connection behaves in
another way that the ABI allows. What goes over the connection is recorded, and the rules
(`rules.py`) are checked over the recordings.
"""
