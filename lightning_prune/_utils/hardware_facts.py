"""The processor and the memory: cores, frequencies, instruction sets. It needs nothing but Python."""

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_prune._utils.processor import processor_name, usable_cores
from lightning_prune._utils.readings import NotReadable, number_of, numbered, printed_by, text_of

_CPUS = Path("sys/devices/system/cpu")
# By the names of Linux: what matrix products in float32, bfloat16 and int8 depend on.
_X86_SETS = ("fma", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_ARM_SETS = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme", "sme2")
_APPLE_SETS = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16", "sme": "FEAT_SME"}


def processor_facts(root: Path = Path("/")) -> dict[str, Any]:
    """Model, cores, frequencies and instruction sets of the processor.

    Args:
        root: Where `/proc` and `/sys` are.

    Returns:
        Name -> value. Of frequencies, how many cores have which: some processors have fast and slow ones.
    """
    cpus = numbered(root / _CPUS, "cpu")
    places = {
        (text_of(cpu / "topology/physical_package_id"), text_of(cpu / "topology/core_id"))
        for cpu in cpus
        if (cpu / "topology/core_id").is_file()
    }
    nodes = numbered(root / "sys/devices/system/node", "node")
    return {
        "model": processor_name(),
        "architecture": platform.machine(),
        "sockets": len({package for package, _ in places}) or _missing(root, "topology"),
        "physical_cores": len(places) or _missing(root, "topology"),
        "logical_cores": os.cpu_count() or NotReadable("os.cpu_count() does not say"),
        "usable_cores": usable_cores(),
        "numa_nodes": len(nodes) or NotReadable(f"no {root / 'sys/devices/system/node'}"),
        "cores_by_frequency": _max_frequencies(cpus) or _missing(root, "cpufreq/cpuinfo_max_freq"),
        "instruction_sets": instruction_sets(root),
        "virtual_machine": _is_virtual(root),
    }


def instruction_sets(root: Path = Path("/")) -> list[str] | NotReadable:
    """The instruction sets of the processor that matrix products depend on, by the names of Linux.

    Args:
        root: Where `/proc` is.
    """
    if platform.system() == "Darwin":
        return _of_apple()
    flags = _flags(root)
    if not flags:
        return NotReadable(f"no flags in {root / 'proc/cpuinfo'}")
    return [name for name in (*_X86_SETS, *_ARM_SETS) if name in flags]


def memory_facts(root: Path = Path("/")) -> dict[str, Any]:
    """Memory of the machine in GiB, and whether Linux gives large pages.

    Args:
        root: Where `/proc` and `/sys` are.
    """
    text = text_of(root / "proc/meminfo")
    known: dict[str, int] = {}
    if isinstance(text, str):
        lines = (line.split() for line in text.splitlines())
        known = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known = {"MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024}
    pages = text_of(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = pages if isinstance(pages, NotReadable) else pages.partition("[")[2].partition("]")[0] or pages
    return {
        name: round(known[key] / 2**20, 2) if key in known else NotReadable(f"no {key} in {root / 'proc/meminfo'}")
        for name, key in (("total_gib", "MemTotal"), ("available_gib", "MemAvailable"), ("swap_gib", "SwapTotal"))
    } | {"transparent_huge_pages": chosen}


def _flags(root: Path) -> set[str]:
    text = text_of(root / "proc/cpuinfo")
    lines = [] if isinstance(text, NotReadable) else text.splitlines()
    named = (line.partition(":") for line in lines)
    return next(
        (set(value.split()) for name, _, value in named if name.strip().lower() in ("flags", "features")), set()
    )


def _is_virtual(root: Path) -> bool | NotReadable:
    """Whether a hypervisor says that it is there; Linux shows its flag on x86 processors only."""
    flags = _flags(root)
    if not {"fpu", "sse2"} & flags:
        return NotReadable(f"no flags of an x86 processor in {root / 'proc/cpuinfo'}")
    return "hypervisor" in flags


def _missing(root: Path, name: str) -> NotReadable:
    return NotReadable(f"no {root / _CPUS}/cpu*/{name}")


def _max_frequencies(cpus: list[Path]) -> dict[str, int]:
    """Frequency -> how many cores have it as the highest."""
    found = (number_of(cpu / "cpufreq/cpuinfo_max_freq") for cpu in cpus)
    return dict(Counter(f"{each // 1000} MHz" for each in found if isinstance(each, int)))


def _of_apple() -> list[str] | NotReadable:
    said = {name: printed_by(["sysctl", "-n", f"hw.optional.arm.{key}"]) for name, key in _APPLE_SETS.items()}
    if all(isinstance(each, NotReadable) for each in said.values()):
        return next(each for each in said.values() if isinstance(each, NotReadable))
    return [name for name, each in said.items() if each == "1"]
