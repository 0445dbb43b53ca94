"""One whole iteration as one CUDA graph: thousands of kernels are launched at once instead of one by one.

A graph replays the very kernels on the very memory that it was captured with. So shapes must be fixed, nothing may wait
for the host, and what is a plain number (a learning rate) is captured as it is. torch's generator goes on as it would
have without the graph, so that a run may change between the two at any iteration.
"""

import warnings
from collections.abc import Callable, Hashable

import torch

from dhbe.errors import out_of_memory
from dhbe.steps import Round

WARM = 3
"""Iterations that run as usual first, on a stream of their own: libraries choose kernels, optimisers make their states."""

WAITS = "synchronizing CUDA operation"
"""What torch warns of where something waits for the host."""


class CudaGraph:
    """Calls an iteration; from the fourth call with the same settings on, by replaying its graph.

    An iteration that cannot be captured (a vendor's code that looks at numbers waits for the host) goes on as usual.

    Args:
        iteration: One iteration, on the current CUDA device. What it returns may be overwritten by the next one, so copies
            are handed on.
    """

    def __init__(self, iteration: Callable[[], Round]) -> None:
        self._iteration = iteration
        self._settings: Hashable = None
        self._calls = 0
        self._aside: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._round: Round = {}
        self._waits = False

    def __call__(self, settings: Hashable) -> Round:
        """One iteration; whenever `settings` differ, all that the graph holds as plain numbers is captured anew."""
        if settings != self._settings:
            self._settings, self._calls, self._graph = settings, 0, None
        self._calls += 1
        if self._waits:
            return self._iteration()
        if self._calls <= WARM:
            return self._warm()
        if self._graph is None:
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, stream=self._aside):  # torch's own may be another GPU's
                    self._round = self._iteration()
            except RuntimeError as error:
                torch.cuda.set_stream(before)
                if out_of_memory(error):
                    raise
                self._waits = True
                return self._iteration()
            self._graph = graph
        self._graph.replay()
        return {name: value.clone() for name, value in self._round.items()}

    def _warm(self) -> Round:
        """One iteration as usual, watched for what waits."""
        aside = self._aside = self._aside or torch.cuda.Stream()
        before = torch.cuda.get_sync_debug_mode()
        aside.wait_stream(torch.cuda.current_stream())
        with warnings.catch_warnings(record=True) as told, torch.cuda.stream(aside):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if self._calls == WARM else before)  # the first ones set things up
            try:
                round = self._iteration()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(aside)
        self._waits = any(WAITS in str(each.message) for each in told)
        return {name: value.detach() for name, value in round.items()}
