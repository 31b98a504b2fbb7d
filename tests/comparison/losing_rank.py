"""The command, in which rank 1 is lost in the middle of the validation of the pruned model, if that is asked for."""

import os
import signal
import sys
from typing import Any

from lightning_prune.__main__ import main
from lightning_prune.comparison.variant_runs import Deployment

if __name__ == "__main__":
    before_batch = Deployment._before_batch

    def lost(self: Deployment, *args: Any) -> None:
        before_batch(self, *args)
        batch_idx = args[3]
        if self.variant.schedule is not None and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("LOST_RANK") == os.environ.get("LOCAL_RANK", "0"):
        Deployment._before_batch = lost
    sys.exit(main(sys.argv[1:]))
