"""CUDA graphs on a CPU, for tests: a capture records operations with their addresses, a replay runs them again.

As on a GPU, a capture changes no memory, and a replay runs no Python: what Python decided during the capture, the
tensors it had and the numbers that it read from the host are constants of the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class RecordedGraphs:
    """Takes the place of `CudaGraphs` on a CPU.

    Attributes:
        events: "run", "capture", "replay" and "release", in the order in which they happened.
    """

    def __init__(self) -> None:
        self.events: list[str] = []

    def run(self, work: Callable[[], None]) -> None:
        """Do the work now."""
        self.events.append("run")
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work; memory that existed before is restored afterwards."""
        self.events.append("capture")
        recorder = _Recorder()
        with recorder:
            work()
        recorder.restore()

        def replay() -> None:
            self.events.append("replay")
            recorder.replay()

        return replay

    def release(self) -> None:
        """Nothing to free."""
        self.events.append("release")


class _Recorder(TorchDispatchMode):
    """The operations that reach the kernels, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.own: set[int] = set()  # addresses of memory that was allocated during the capture
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that the capture has written to: as it was

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation and let it run, so that the next one has its results."""
        kwargs = kwargs or {}
        assert func._schema.name not in HOST_SYNCS, f"{func} waits for the device, which a capture cannot"
        given = {tensor.data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._save(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._save(argument, kwargs[argument.name])
        out = func(*args, **kwargs)
        results = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.own |= {_storage(tensor) for tensor in results if tensor.data_ptr() not in given and _is_new(func)}
        self.operations.append((func, args, kwargs, results))
        return out

    def _save(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self.own:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before.setdefault(_storage(tensor), (whole, whole.clone()))

    def restore(self) -> None:
        """Undo what the operations wrote to memory that existed before."""
        for now, then in self.before.values():
            now.copy_(then)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again; their results go where they went in the capture."""
        for func, args, kwargs, results in self.operations:
            again = [tensor for tensor in tree_leaves(func(*args, **kwargs)) if isinstance(tensor, Tensor)]
            for new, recorded in zip(again, results, strict=True):
                if new.data_ptr() != recorded.data_ptr():
                    recorded.copy_(new)


def _is_new(func: Any) -> bool:
    """Whether an operation's results are new memory, not views of its arguments."""
    return all(result.alias_info is None for result in func._schema.returns)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
