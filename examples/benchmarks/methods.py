"""Accuracy against latency: every method at every speed-up that it attains, and the planner's choice.

Runs `lightning-prune compare --methods`, which plans, times and validates; by default on the embedded digits model,
which needs no other files.

    python examples/benchmarks/methods.py --output results/methods
    python examples/benchmarks/methods.py --config configs/cifar10.yaml --output results/methods
"""

import argparse
import sys

from lightning_prune.cli.main import run

METHODS = ["dense", "auto", "tome", "pomt-nearest", "pomt", "topk", "evit", "random"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--speedups", nargs="+", default=["1.1", "1.25", "1.5", "2"])
    parser.add_argument("--output", required=True, help="folder")
    args, more = parser.parse_known_args()
    options = ["--methods", *args.methods, "--speedups", *args.speedups, "--output", args.output]
    sys.exit(run(["compare", "--config", args.config, *options, *more]))


if __name__ == "__main__":
    main()
