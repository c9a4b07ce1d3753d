"""What has to happen before torch is imported: the allocator setting. `__main__` imports this first.

glibc gives every large temporary its own mapping and page-faults it anew at each step. Kept in the heap instead, a step
of the primer's net is 1.3 to 1.7 times faster. The memory is handed back only when the process ends:
CLOCHE_ALLOCATOR=system leaves the allocator as it is.
"""

import ctypes
import os
import sys
import time

T0 = time.perf_counter() - time.process_time()  # when the process began, but for what it waited: the start of the command

# (option, value) as malloc.h numbers them: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
SETTINGS = ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20))


tuned = False  # whether the allocator setting is in force


def calm_threads() -> None:
    """A thread that waits for another soon gives its core away. With OpenMP's own patience a small net trained a third as fast beside
    other work (11 000 against 32 000 pictures/s, one run each); on an idle machine the primer's net showed no difference."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def tune_allocator() -> bool:
    """True when the setting is in force (Linux with glibc, not switched off)."""
    if not sys.platform.startswith("linux") or os.environ.get("CLOCHE_ALLOCATOR") == "system" or "torch" in sys.modules:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has no mallopt
        return False
    global tuned
    tuned = all(libc.mallopt(option, value) for option, value in SETTINGS)
    return tuned
