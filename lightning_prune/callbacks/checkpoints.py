"""Keeping a patch out of checkpoints that are written while it lasts."""

import copy
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.patching import unpatch
from lightning_prune.patching.overlay import is_overlaid


def make_dense(checkpoint: dict[str, Any]) -> None:
    """Puts unpatched copies in the place of patched modules among the hyperparameters of a checkpoint.

    Weights have no patch on them, but a module that was passed to a LightningModule may be one of its hyperparameters,
    and is pickled as it is.

    Args:
        checkpoint: As Lightning hands it to `on_save_checkpoint`; changed in place.
    """
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        for name, value in dict(checkpoint.get(key, {})).items():
            if any(map(_patched, tree_leaves(value))):
                checkpoint[key][name] = dense = copy.deepcopy(value)
                for leaf in filter(_patched, tree_leaves(dense)):
                    unpatch(leaf)


def _patched(value: Any) -> bool:
    return isinstance(value, nn.Module) and any(is_overlaid(module) for module in value.modules())
