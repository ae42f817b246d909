"""What an honest script does: threads, asyncio, numpy, the standard library, its descriptors."""

import asyncio
import concurrent.futures
import dataclasses
import decimal
import glob
import hashlib
import importlib
import json
import mmap
import os
import pathlib
import random
import re
import select
import selectors
import socket
import sqlite3
import statistics
import sys
import threading
import time
import zlib

import numpy as np

assert __name__ == "__main__" and sys.argv[0] == __file__, (__name__, sys.argv)
assert sys.modules["__main__"].__dict__ is globals()
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(lambda x: x * x, range(100))) == 328350
lock, event = threading.Condition(), threading.Event()
threading.Timer(0.001, event.set).start()
assert event.wait(10)


async def main():
    async def worker(k):
        await asyncio.sleep(0.001)
        return k

    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, lambda: 5) == 5
    return await asyncio.gather(*map(worker, range(50)))


assert asyncio.run(main()) == list(range(50))
matrix = np.random.default_rng(1).normal(size=(300, 300))
assert np.allclose(np.linalg.inv(matrix) @ matrix, np.eye(300))
assert np.fft.fft(np.ones(8))[0] == 8
assert json.loads(json.dumps({"a": [1, 2.5, None]})) == {"a": [1, 2.5, None]}
assert re.sub(r"\d+", lambda m: str(int(m[0]) * 2), "a21b4") == "a42b8"
assert zlib.decompress(zlib.compress(b"x" * 1000)) == b"x" * 1000
assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3")
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
assert statistics.mean([1, 2, 3]) == 2 and len(os.urandom(8)) == 8
database = sqlite3.connect(":memory:")
assert database.execute("select 6 * 7").fetchone() == (42,)
for module in ("wave", "difflib", "csv", "html.parser", "xml.etree.ElementTree", "lzma", "bz2"):
    importlib.import_module(module)
assert np.random.randint(1 << 30) >= 0 and random.random() < 1

assert mmap.mmap(4, 65536, mmap.MAP_SHARED, mmap.PROT_READ)[:4] == b"\0\0\0\0"
mmap.mmap(5, 65536)[65530:] = b"inside"
assert os.pread(6, 100, 0) == b"\x81\xa4args\x90" and os.pread(7, 100, 0) == b"vocab"
connection = socket.socket(fileno=3)
assert (
    connection.family == socket.AF_UNIX
    and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
)
connection.setblocking(False)
selector = selectors.DefaultSelector()
selector.register(connection, selectors.EVENT_WRITE)
assert selector.select(1)
connection.send(b"pie")
poll = select.poll()
poll.register(3, select.POLLIN)
assert poll.poll(1) == []
assert pathlib.Path(__file__).read_text().startswith('"""What an honest') and glob.glob(__file__)
assert dataclasses.make_dataclass("Point", ["x"])(3).x == 3
assert os.getpid() > 1 and os.getcwd() == "/" and os.cpu_count() and time.sleep(0.001) is None
assert sys.stdout.line_buffering and sys.stdin.read() == ""
print("honest")
sys.exit(7)
