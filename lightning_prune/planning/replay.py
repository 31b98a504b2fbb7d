"""Passes that begin in the middle: what the blocks before computed once is handed on again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What the `forward` of each block returns in a pass, before any hook of a user sees it.

    Args:
        blocks: Whose outputs are wanted.

    Yields:
        One output a block, each a copy: a later block may work on its input in place.
    """
    passed: list[Any] = [None] * len(blocks)

    def recording(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            passed[index] = _copied(output)
            return output

        return run

    with _instead(blocks, [recording(index, block.forward) for index, block in enumerate(blocks)]):
        yield passed


@contextmanager
def replayed(blocks: Sequence[nn.Module], passed: Sequence[Any]) -> Iterator[None]:
    """Passes in which blocks return what they returned before, without computing it; their hooks run as ever.

    Args:
        blocks: Those that are skipped.
        passed: As `recorded` yields them; left as they are by whatever works on them in place.
    """
    with _instead(blocks, [lambda *_, _kept=kept, **__: _copied(_kept) for kept in passed[: len(blocks)]]):
        yield


@contextmanager
def _instead(blocks: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Other functions in place of the blocks' own `forward`, which may be one that the user has put there."""
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
    """The same with tensors of its own, whatever containers of the usual kinds they are in."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_copied, output))
    if isinstance(output, tuple | list):
        return type(output)(map(_copied, output))
    if isinstance(output, dict):
        return type(output)({key: _copied(value) for key, value in output.items()})
    return output
