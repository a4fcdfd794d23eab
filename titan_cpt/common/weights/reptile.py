"""When Reptile pulls the weights of a stage back towards those of before, and how far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reptile:
    """After every `every` steps of a stage, the weights become old + step * (new - old): training/weights/reptile.py.

    Attributes:
        on_host: the old weights are kept in host memory, otherwise on the device.
    """

    every: int
    step: float
    on_host: bool = True

    def is_due(self, steps_done: int) -> bool:
        """Whether weights are pulled after this number of steps."""
        return steps_done > 0 and steps_done % self.every == 0
