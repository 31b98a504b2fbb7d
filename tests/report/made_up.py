"""A comparison that nobody measured: every kind of row that a real one may have."""

import math
from typing import Any

IMAGES = 2000
TARGETS = (1.1, 1.25, 1.5, 2.0)
# Method -> points of accuracy lost at each target; fewer figures: the later targets cannot be reached.
LOST = {
    "pomt": (0.10, 0.35, 1.10, 4.30),
    "tome": (-0.05, 0.15, 0.80),
    "topk": (0.30, 0.90, 2.60, 8.10),
    "evit": (0.20, 0.60, 1.90, 6.00),
    "shift": (0.25, 0.70, 2.20, 6.60),
    "random": (1.20, 3.00, 7.40, 14.8),
    "vwt-intra": (0.15, 1.10, 8.20, 19.7),
    "pomt+int8": (0.25, 0.50, 1.30, 4.60),
}
COMMAND = "lightning-prune compare --config configs/cifar10.yaml --methods dense " + " ".join([*LOST, "int8"])


def row(variant: str, **facts: Any) -> dict[str, Any]:
    """One row, dense unless told otherwise, with the columns of `results.json`."""
    columns = {
        "variant": variant,
        "method": "",
        "int8": False,
        "target_speedup": None,
        "block": "",
        "removed": 0,
        "tokens": 197,
        "top1": 0.931,
        "top1_change": None,
        "top1_low": None,
        "top1_high": None,
        "top5": 0.9975,
        "agreement": None,
        "latency_ms": 106.99,
        "latency_p90_ms": 109.5,
        "runtime": "torch",
        "latency_low_ms": 106.9,
        "latency_high_ms": 109.3,
        "latency_spread": 1.2,
        "speedup": 1.0,
        "speedup_vs_eager": None,
        "metric": None,
        "metric_change": None,
        "metric_name": "",
        "speedup_spread": 0.0,
        "throughput": 149.5,
        "throughput_end_to_end": 121.0,
        "joules_per_image": None,
        "watts": None,
        "images": IMAGES,
        "device": "AMD EPYC",
        "batch_size": 16,
        "precision": "float32",
        "peak_memory_mib": 61.0,
        "gmacs": 1.25,
        "note": None,
    }
    assert not facts.keys() - columns.keys()
    return columns | facts


def pruned(method: str, target: float, lost: float, **facts: Any) -> dict[str, Any]:
    """A method at a target, `lost` points below dense."""
    share = lost / 100
    half = 1.96 * math.sqrt((abs(share) + 0.004) / IMAGES)
    speedup = target * 1.02
    removed = round(197 * (1 - 1 / speedup) * 1.3)
    columns = {
        "method": method.removesuffix("+int8"),
        "int8": method.endswith("int8"),
        "target_speedup": target,
        "block": " ".join(map(str, range(12))) if method == "tome" else "0" if method == "vwt-intra" else "3",
        "removed": removed,
        "tokens": 197 - removed,
        "top1": 0.931 - share,
        "top1_change": -share,
        "top1_low": -share - half,
        "top1_high": -share + half,
        "top5": 0.9975 - share / 8,
        "agreement": 1 - abs(share) * 1.4 - 0.004,
        "latency_ms": 106.99 / speedup,
        "latency_low_ms": 106.9 / speedup,
        "latency_high_ms": 109.3 / speedup,
        "latency_spread": 1.2 / speedup,
        "speedup": speedup,
        "speedup_spread": 0.014,
        "throughput": 149.5 * speedup,
        "throughput_end_to_end": 121.0 * math.sqrt(speedup),
    }
    return row(f"{method} {target:g}x", **columns | facts)


def comparison() -> dict[str, Any]:
    """A full comparison: thirty-odd rows, a method that misses a target, and methods that end below `random`."""
    rows = [row("dense")]
    for method, all_lost in LOST.items():
        rows += [pruned(method, target, lost) for target, lost in zip(TARGETS, all_lost, strict=False)]
    rows.append(
        row("int8", int8=True, top1=0.930, top1_change=-0.001, top1_low=-0.004, top1_high=0.0021, agreement=0.991)
        | {"latency_ms": 118.9, "speedup": 0.9, "speedup_spread": 0.01, "throughput": 134.2}
    )
    return {
        "rows": rows,
        "context": {
            "device": "AMD EPYC",
            "device_type": "cpu",
            "threads": 2,
            "batch_size": 16,
            "image_shape": [3, 224, 224],
            "precision": "float32",
            "compiled": False,
            "model": "VisionTransformer",
            "parameters": 5_400_000,
            "torch": "2.15.0",
            "timm": "1.0.31",
        },
        "seconds": 1834.2,
        "command": COMMAND + " --speedups 1.1 1.25 1.5 2.0 --output results/cifar10",
        "started": "2026-11-21T10:31:07",
        "energy": "n/a (no energy counter on this device)",
        "unreached": [
            {
                "method": "tome",
                "target_speedup": 2.0,
                "best": 1.62,
                "reason": "it merges at most half of the tokens in each of 12 blocks",
            }
        ],
        "variants": {
            each["variant"]: {
                "schedule": {
                    "format": "lightning_prune schedule",
                    "version": 1,
                    "removed": [each["removed"] if block == 3 else 0 for block in range(12)],
                },
                "method": each["method"],
                "settings": {"proportional_attention": True} if each["method"] == "tome" else {},
                "note": "The smallest cut that reaches it.",
            }
            for each in rows
            if each["removed"]
        },
    }


def planned() -> dict[str, Any]:
    """What a comparison without methods or targets writes: its rows have fewer columns."""
    rows = [
        row("dense"),
        row(
            "pomt utility", method="pomt", block="3", removed=177, tokens=20, top1=0.906, latency_ms=45.36, speedup=2.36
        ),
        row("pomt budget", method="pomt", block="3", removed=161, tokens=36, top1=0.928, latency_ms=50.1, speedup=2.14),
    ]
    later = ("int8", "target_speedup", "top1_change", "top1_low", "top1_high", "agreement", "speedup_spread", "note")
    rows = [
        {
            name: value
            for name, value in each.items()
            if name not in (*later, "joules_per_image", "watts", "gmacs", "peak_memory_mib")
        }
        for each in rows
    ]
    return {
        "rows": rows,
        "context": comparison()["context"],
        "seconds": 48.6,
        "variants": {"pomt utility": {"reason": "Best by utility.", "schedule": {"removed": [0, 0, 0, 177] + [0] * 8}}},
    }


def without_accuracy(document: dict[str, Any], *also: str) -> dict[str, Any]:
    """The document of a module that logs no accuracy, and without the columns of `also`."""
    unknown = dict.fromkeys(("top1", "top1_change", "top1_low", "top1_high", "top5", *also))
    return document | {"rows": [each | unknown for each in document["rows"]]}
