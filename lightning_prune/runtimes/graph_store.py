"""Converted graphs of a model, kept for when they run again."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from lightning_prune.runtimes.graph_export import ExportedGraph

RunGraph = Callable[..., list[Tensor]]
Converted = tuple[ExportedGraph, RunGraph]

_GRAPH_BYTES = 4 * 2**30
_FEWEST_GRAPHS = 8


def graphs_to_keep(model: nn.Module) -> int:
    """How many graphs of a model are kept at a time: each holds a copy of its weights, 4 GiB in all.

    Those that are dropped are converted or loaded again when they are needed, which takes seconds and no timing.
    """
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return max(_GRAPH_BYTES // max(weights, 1), _FEWEST_GRAPHS)


class GraphStore:
    """Converted graphs of one model in one runtime, all of its weights as they were when they were converted.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._most = model, graphs_to_keep(model)
        self._graphs: OrderedDict[Hashable, Converted] = OrderedDict()
        self._weights: Hashable = None
        self._tensors: Sequence[Tensor] = ()

    def take_weights(self, tensors: Sequence[Tensor]) -> None:
        """Drops all graphs if they were made of other weights and buffers than these.

        Args:
            tensors: Kept, so that no other tensor can take the place of one in memory unnoticed.
        """
        weights = tuple((id(tensor), tensor.data_ptr(), version_of(tensor)) for tensor in tensors)
        if weights != self._weights:
            self._graphs.clear()
        self._weights, self._tensors = weights, tensors

    def get(self, key: Hashable, convert: Callable[[], Converted]) -> Converted:
        """The graph of a key; converted where there is none.

        Args:
            key: Everything besides the weights that the graph depends on.
            convert: Makes it.
        """
        if key not in self._graphs:
            self._graphs[key] = convert()
        self._graphs.move_to_end(key)
        while len(self._graphs) > self._most:
            self._graphs.popitem(last=False)
        return self._graphs[key]


_kept: ContextVar[dict[tuple[int, str], GraphStore] | None] = ContextVar("kept_graphs", default=None)


@contextmanager
def keeping_graphs() -> Iterator[None]:
    """A context in which graphs stay when their runtime is no longer applied, for when it is applied again.

    A comparison applies each runtime many times, and converting takes seconds. Everything is freed at its end.

    Example:
        >>> from lightning_prune.runtimes.graph_store import keeping_graphs
        >>> with keeping_graphs():
        ...     pass  # apply a runtime, undo that, and apply it again: nothing is converted twice
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def store_of(model: nn.Module, runtime: str) -> GraphStore:
    """A new store, or in `keeping_graphs` the one of this model and runtime.

    Args:
        model: The model.
        runtime: The spec of the runtime.
    """
    kept = _kept.get()
    if kept is None:
        return GraphStore(model)
    return kept.setdefault((id(model), runtime), GraphStore(model))  # which holds the model: no other gets its id


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version
