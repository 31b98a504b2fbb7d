"""Measuring leaves no trace in what the user's hooks collect."""

import pytest

from .tiny import Tiny, brief, validated


@pytest.mark.parametrize("options", [{"schedule": 8}, {"method": "tome"}], ids=["given", "planned"])
@pytest.mark.usefixtures("clockwork")
def test_hooks_are_called_for_the_steps_of_the_run_and_nothing_else(options):
    module, features, tokens = Tiny(), [], []
    module.vit.norm.register_forward_hook(lambda *_: features.append(1))
    module.vit.blocks[0].mlp.register_forward_hook(lambda _, args, output: tokens.append(args[0].shape[1]))
    with pytest.warns(UserWarning, match=r"The 2 forward hooks .*<lambda>.* are not called while it is measured"):
        validated(brief(**options), module)
    assert len(features) == len(tokens) == len(module.steps)
