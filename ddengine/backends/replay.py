"""A function of tensors captured once as a CUDA graph over buffers of its own, and replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# Runs a body once so that it can be run again on the same buffers, and returns what does so.
Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]

WARM_UPS = 2  # runs before the capture: libraries choose their algorithms and allocate on the first


class Replayed:
    """state <- function(state, constants), again and again, on static buffers that live here and nowhere else.

    `load` copies values in, `replay` launches one run, `state` is what the last run left (the buffers themselves: copy
    what shall outlive the next run). function: flat lists of tensors to the new state, of fixed shapes, no host reads.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
        state: Sequence[Tensor],
        constants: Sequence[Tensor],
        capture: Capture | None = None,
    ) -> None:
        """state, constants: examples of all shapes, strides and dtypes. capture: a CUDA graph's, unless given."""
        self.state = [torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor) for tensor in state]
        self.constants = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor) for tensor in constants
        ]

        def run() -> None:
            for buffer, tensor in zip(self.state, function(self.state, self.constants), strict=True):
                buffer.copy_(tensor)

        self._replay = (capture or capture_cuda)(run)

    def load(self, state: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        """Put values into the buffers; a buffer itself stays as it is, and so do all constants where none are given."""
        for buffers, tensors in ((self.state, state), (self.constants, constants or self.constants)):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                if buffer is not tensor:
                    buffer.copy_(tensor)

    def replay(self) -> None:
        """Launch one run on the current stream; returns at once."""
        self._replay()


def capture_cuda(body: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what `body` launches on the current device; its buffers are used by warming up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay
