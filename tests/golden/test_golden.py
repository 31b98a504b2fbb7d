"""Every method in every family gives the logits that it gave when `golden.json` was written.

A case that fails although its dense case holds is a change in lightning_prune: other tokens are kept or merged. Where
the dense case fails as well, the library that the model comes from computes it differently.
"""

import pytest
import torch

from .cases import CASES, Case, build, images, run
from .make_golden import ATOL, RTOL, load

GOLDEN = load()


def test_the_file_holds_every_case() -> None:
    assert list(GOLDEN) == [str(case) for case in CASES]


@pytest.mark.parametrize("case", sorted(CASES, key=lambda case: case.model), ids=str)  # models are built once
def test_logits_are_as_they_were(case: Case) -> None:
    found = run(case, build(case.model), images())
    torch.testing.assert_close(found, torch.tensor(GOLDEN[str(case)]), rtol=RTOL, atol=ATOL)
