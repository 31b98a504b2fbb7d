"""The range of 8-bit weights on processors whose sums of products saturate."""

import platform
from functools import cache

import torch

_X86 = ("x86_64", "amd64", "i386", "i686")
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "avx10_1")


def reduces_range(asked: bool | None, on_cpu: bool) -> bool:
    """Whether weights are stored in 7 of 8 bits.

    Args:
        asked: What the user asked for; None to decide by this machine.
        on_cpu: Whether the model runs on the processor, and not on an accelerator.
    """
    return on_cpu and sums_saturate() if asked is None else asked


@cache
def sums_saturate() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which large weights and activations exceed.

    x86 processors do so without VNNI instructions (AVX-512-VNNI, AVX-VNNI) or AMX: their `vpmaddubsw` saturates.
    """
    if platform.machine().lower() not in _X86:
        return False
    known = torch.cpu.get_capabilities()
    return not any(known.get(name, False) for name in _WIDE_SUMS)
