"""Memory for weights, taken from the system while Python is still busy importing and parsing.

A page is found and cleared when it is first written. Where a host has to find it for its virtual
machine, that was up to 4 s a gigabyte, more than reading and laying out the weights themselves; and
it needs no Python, which importing PyTorch and reading a tokenizer keep to themselves for 2 s.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

#: Begins weights at cache lines.
_ALIGNMENT = 64
#: Bytes that are made ready at once; who takes some waits for no more.
_CHUNK = 16 << 20


class ReadyMemory:
    """So many bytes, handed out from the first to the last. Thread-safe."""

    def __init__(self, size: int) -> None:
        """Begin to take ``size`` bytes from the system, which goes on in a thread of its own."""
        self._bytes = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._taken = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def take(self, size: int) -> memoryview | None:
        """The next bytes, ready or not; None: there are not so many left."""
        with self._lock:
            begin = -(-self._taken // _ALIGNMENT) * _ALIGNMENT
            if begin + size > len(self._bytes):
                return None
            self._taken = begin + size
            return memoryview(self._bytes)[begin : begin + size]

    def settle(self) -> None:
        """Give back what nobody took; nothing can be taken any more."""
        self._thread.join()
        with self._lock:
            begin = -(-self._taken // mmap.PAGESIZE) * mmap.PAGESIZE
            if begin < len(self._bytes):
                self._bytes.madvise(mmap.MADV_DONTNEED, begin)
            self._taken = len(self._bytes)

    def _fill(self) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._bytes.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
        for begin in range(0, len(self._bytes), _CHUNK):
            with self._lock:
                if begin < self._taken:  # somebody may have written there
                    continue
                # Without the interpreter's lock. MADV_POPULATE_WRITE would clear pages only once,
                # but nothing else can map memory meanwhile, such as the import of a library.
                ctypes.memset(first + begin, 0, min(_CHUNK, len(self._bytes) - begin))
