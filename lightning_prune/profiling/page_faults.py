"""Page faults: memory that the allocator gave back to the system, and that a pass has to ask for again.

They are part of what a pass takes where it runs, but only by chance of its sizes: glibc keeps the buffers of a model as
long as they are small enough, so that one side of a ratio may pay them and the other may not.

It needs the standard library alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

import mmap
import sys
import time
from functools import cache
from statistics import median

if sys.platform != "win32":
    import resource

MATTERS = 0.02
"""Share by which page faults must change a ratio to be said: no smaller gain is worth any accuracy."""
KEPT_MEMORY = (
    "MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ make glibc keep the memory, here and where the model will run; "
    "see https://lightning-prune.github.io/lightning-prune/benchmarks/."
)
"""What is said of page faults that matter."""
_PROBED_BYTES, _PROBES = 2**20, 15
_FEWEST = 1  # counted in a probe; of huge pages there may be one


def count_page_faults() -> int | None:
    """Page faults of this process so far, without those that read a disk; None where the system does not count them.

    Example:
        >>> from lightning_prune.profiling.page_faults import count_page_faults
        >>> before = count_page_faults()
        >>> before is None or count_page_faults() >= before
        True
    """
    if sys.platform == "win32":
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@cache
def seconds_per_fault() -> float | None:
    """Seconds that a page fault takes on this machine; None where none are counted.

    Fresh memory of a MiB is written to twice, a byte in each page: the first time takes longer by its page faults, and
    giving the memory back is part of what they cost. The median CPU time of several tries. Of 1.1 us by this, the
    faults of models were seen to take 0.9 us (DeiT-S) and 2.2 us (a small ViT): caches are cold after them, too.
    """
    found = [seconds for seconds in (_probe() for _ in range(_PROBES)) if seconds is not None]
    return median(found) if found and median(found) > 0 else None


def fault_context(device_type: str) -> dict[str, float]:
    """`fault_us`, the microseconds of a page fault, for the context of a measurement; nothing where none count.

    Args:
        device_type: Where the passes run: on a device other than a CPU the host waits for it anyway.
    """
    seconds = seconds_per_fault() if device_type == "cpu" else None
    return {} if seconds is None else {"fault_us": round(1e6 * seconds, 3)}


def _probe() -> float | None:
    pages = bytes(_PROBED_BYTES // mmap.PAGESIZE)
    memory, before = mmap.mmap(-1, _PROBED_BYTES), count_page_faults()
    start = time.thread_time()
    memory[:: mmap.PAGESIZE] = pages
    first, after = time.thread_time() - start, count_page_faults()
    start = time.thread_time()
    memory[:: mmap.PAGESIZE] = pages
    again = time.thread_time() - start
    start = time.thread_time()
    memory.close()
    first += time.thread_time() - start
    if before is None or after is None or after - before < _FEWEST:
        return None
    return (first - again) / (after - before)


def unequal_faults(
    ms: float, faults: float | None, dense_ms: float, dense_faults: float | None, fault_us: float | None
) -> str:
    """What is said of a ratio in which one side pays page faults that the other does not; empty where that is little.

    Args:
        ms: Latency of a pass.
        faults: Page faults in it; None where they are not known.
        dense_ms: That of the dense model.
        dense_faults: Its page faults.
        fault_us: Microseconds that a page fault takes; None where that is not known.

    Returns:
        A remark without a full stop, with the speed-up without them.

    Example:
        >>> from lightning_prune.profiling.page_faults import unequal_faults
        >>> unequal_faults(100.0, 12, 176.0, 20_000, fault_us=0.5)
        'page faults: 12 a pass, 20000 in dense, which cost dense at least 10.0 of 176.0 ms; without them at most 1.66x'
        >>> unequal_faults(100.0, 12, 176.0, 2_000, fault_us=0.5)
        ''
    """
    if faults is None or dense_faults is None or fault_us is None:
        return ""
    own, of_dense = _cost_ms(ms, faults, fault_us), _cost_ms(dense_ms, dense_faults, fault_us)
    without = (dense_ms - of_dense) / (ms - own)
    if abs(without * ms / dense_ms - 1) <= MATTERS:
        return ""
    both = f"{faults:.0f} a pass, {dense_faults:.0f} in dense"
    dense_pays = of_dense / dense_ms > own / ms
    paid = f"dense at least {of_dense:.1f} of {dense_ms:.1f}" if dense_pays else f"this at least {own:.1f} of {ms:.1f}"
    bound = "at most" if dense_pays else "at least"
    return f"page faults: {both}, which cost {paid} ms; without them {bound} {without:.2f}x"


def _cost_ms(ms: float, faults: float, fault_us: float) -> float:
    """Milliseconds of the page faults of a pass; never nearly all of it."""
    return min(1e-3 * fault_us * faults, 0.9 * ms)
