"""Forward passes that start at a later block: the outputs of the earlier blocks are computed once and reused."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Records the output of each block's `forward` in a pass, before any hook sees it.

    Args:
        blocks: Blocks to record.

    Yields:
        One output per block, each a copy, because a later block may change its input in place.
    """
    outputs: list[Any] = [None] * len(blocks)

    def recording(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs[index] = _copied(output)
            return output

        return run

    with _replaced_forwards(blocks, [recording(index, block.forward) for index, block in enumerate(blocks)]):
        yield outputs


@contextmanager
def replayed(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Makes blocks return recorded outputs without computing them; their hooks still run.

    Args:
        blocks: Blocks to skip.
        outputs: Outputs as `recorded` yields them. Every pass gets a copy.
    """
    with _replaced_forwards(
        blocks, [lambda *_, _kept=output, **__: _copied(_kept) for output in outputs[: len(blocks)]]
    ):
        yield


@contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Replaces the `forward` of blocks, which may be an attribute that the user has set, and restores it."""
    own = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if before is not None:
                vars(block)["forward"] = before


def _copied(output: Any) -> Any:
    """A copy of all tensors of an output, inside tuples, lists and dicts, too."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_copied, output))
    if isinstance(output, tuple | list):
        return type(output)(map(_copied, output))
    if isinstance(output, dict):
        return type(output)({key: _copied(value) for key, value in output.items()})
    return output
