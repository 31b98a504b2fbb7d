"""Rewrites `golden.json`, the logits that `test_golden.py` expects.

Only to be run where a change of results is intended (a method is to choose or merge differently, or a case is added),
never to make a failing test pass. Say in the commit which cases changed and why. A case whose logits stay within the
tolerance keeps the numbers that it has, so that the difference of the file shows the cases that changed, and no others.

    python -m tests.golden.make_golden

It refuses cases that say nothing: in which noise, as small as rounding may be on another processor, changes which
tokens are kept, or in which the reduction changes nothing.
"""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor

from .cases import CASES, Case, build, draw, images, run

FILE = Path(__file__).with_name("golden.json")
# Of the test. One wrong token moves a logit of each image by 70 times as much at least, float64 by an eighth at most.
RTOL, ATOL = 1e-4, 5e-5
NOISE = 1e-5  # relative to weights of size 1 and pixels of size 1; float32 rounds to 1e-7
DRAWS = 4
STEADY = 1e-3  # largest change of a logit by noise, relative to the largest logit


def load() -> dict[str, list[list[float]]]:
    """Case -> logits of both images."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def is_close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, RTOL, ATOL)


def unsteadiness(case: Case, logits: Tensor) -> float:
    """How far float64 and noise in images and weights move the logits, relative to the largest."""
    furthest = 0.0
    for number in range(DRAWS + 1):
        noise = NOISE if number else 0.0  # the first draw is float64 alone
        model, batch = copy.deepcopy(build(case.model)).double(), images().double()
        batch = batch + noise * draw(f"noise {number}", tuple(batch.shape))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.mul_(1 + noise * draw(f"noise {number} {key}", tuple(value.shape)))
        furthest = max(furthest, (run(case, model, batch) - logits).abs().max().item())
    return furthest / logits.abs().max().item()


def main() -> None:
    known, golden, refused = load(), dict[str, list[list[float]]](), []
    for case in sorted(CASES, key=lambda case: case.model):
        model, name = build(case.model), str(case)
        logits = run(case, model, images())
        is_known = name in known and is_close(logits, torch.tensor(known[name]))
        moved = 0.0 if is_known else unsteadiness(case, logits)  # of a known case it was looked at before
        dense = run(Case(case.model, "dense", "none"), model, images())
        change = (logits - dense).abs().max() / dense.abs().max()
        if moved > STEADY or (case.method != "dense" and change < 0.01) or not logits.isfinite().all():
            refused.append(f"{name}: noise moves it by {moved:.1e}, the reduction by {change:.1e}")
        golden[name] = [[float(f"{logit:.7g}") for logit in image] for image in logits.tolist()]
        if is_known:
            golden[name] = known[name]
        elif name in known:
            print(f"changed: {name}")
    if refused:
        raise SystemExit("Not written:\n" + "\n".join(refused))
    lines = [f"{json.dumps(str(case))}: {json.dumps(golden[str(case)])}" for case in CASES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")
    print(f"{len(lines)} cases, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
