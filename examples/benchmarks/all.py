"""Runs all benchmarks one after the other; writes CSV files with the context of the measurement, and pictures.

Nothing else should run meanwhile. On two cores this takes about an hour; `--quick` takes minutes, for a first look.

    python examples/benchmarks/all.py --output results/benchmarks
    python examples/benchmarks/all.py --output results/benchmarks --quick
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
FULL = {
    "floor": ["--trace"],
    "profile_cost": ["--simulated", "50", "--model", "vit_tiny_patch16_224", "--batch", "1", "16"],
    "scaling": [],
    "methods": [],
}
ON_GPUS = ["eager", "default", "reduce-overhead"]
QUICK = {
    "floor": [
        "--models",
        "deit_small_patch16_224",
        "--batch-sizes",
        "1",
        "4",
        "--precisions",
        "fp32",
        "--seconds",
        "5",
    ],
    "profile_cost": ["--simulated", "10"],
    "scaling": [
        "--sizes",
        "112",
        "224",
        "448",
        "--batch-sizes",
        "1",
        "4",
        "16",
        "--depths",
        "4",
        "12",
        "--seconds",
        "3",
    ],
    "methods": ["--methods", "dense", "auto", "tome", "random", "--speedups", "1.25", "--prune.time_limit", "60"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder; each benchmark gets one in it")
    parser.add_argument("--only", nargs="+", default=list(FULL), choices=list(FULL))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        more = (QUICK if args.quick else FULL)[name]
        device = ["--trainer.accelerator", "gpu" if args.device.startswith("cuda") else args.device]
        device = device if name == "methods" else ["--device", args.device]
        if name == "floor" and not args.quick:  # many CPUs only emulate bf16, which takes hours
            more = [*more, "--precisions", "fp32"] if args.device == "cpu" else [*more, "--modes", *ON_GPUS]
        command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(args.output / name), *device, *more]
        print(f"== {name}", flush=True)
        if subprocess.run(command, check=False).returncode:  # in a process of its own, so that no state is shared
            failed.append(name)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
