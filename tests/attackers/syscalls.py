"""The same as syscalls.c, by ctypes."""

import ctypes
import os
import struct
import threading

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.pthread_self.restype = ctypes.c_ulong


def call(number, *arguments):
    arguments = list(arguments)
    if number == 56 and arguments[0] in (0x3D0F00, 0x7D0F00):  # it needs a stack and a function
        thread = threading.Thread(target=len, args=("",))
        thread.start()
        return thread.native_id
    if number == 158 and arguments[0] & 0xFFFFFFFF == 0x1002:
        arguments[1] = libc.pthread_self()
    result = libc.syscall(*map(ctypes.c_ulong, [number, *arguments]))
    return -ctypes.get_errno() if result == -1 else result


while data := os.read(3, 56):
    while len(data) < 56:
        data += os.read(3, 56 - len(data))
    os.write(3, struct.pack("<q", call(*struct.unpack("<7Q", data))))
