"""The same as call.c, by ctypes: call.py NUMBER ARGUMENT..."""

import ctypes
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
arguments = [
    ctypes.c_char_p(text[2:].encode()) if text.startswith("s:") else ctypes.c_long(int(text, 0))
    for text in sys.argv[1:]
]
arguments += [ctypes.c_long(0)] * (7 - len(arguments))
result = libc.syscall(*arguments)
print(-ctypes.get_errno() if result < 0 else result)
