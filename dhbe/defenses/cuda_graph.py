"""One iteration as one CUDA graph: thousands of kernels are launched at once instead of one by one.

A graph replays the captured kernels on the captured memory. So shapes must be fixed, nothing may synchronise with the
host, and plain numbers (a learning rate) are frozen at capture. torch's generator advances as it would without the graph,
so a run may switch between the two at any iteration.
"""

import warnings
from collections.abc import Callable, Hashable

import torch

from dhbe.errors import out_of_memory
from dhbe.steps import Round

WARM = 3
"""Eager iterations before capture, on a side stream: libraries choose kernels, optimisers create their state."""

WAITS = "synchronizing CUDA operation"
"""Part of torch's warning when an operation synchronises with the host."""


class CudaGraph:
    """Runs an iteration; from the fourth call with the same settings on, by replaying its graph.

    An iteration that cannot be captured, say because the vendor's code synchronises with the host, keeps running eagerly.

    Args:
        iteration: One iteration, on the current CUDA device. A replay overwrites what it returned, so callers get copies.
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
        """Runs one iteration; a change of `settings`, which hold the captured plain numbers, causes a new capture."""
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
        """Runs one eager iteration, and notes in the last one before capture whether anything synchronises."""
        aside = self._aside = self._aside or torch.cuda.Stream()
        before = torch.cuda.get_sync_debug_mode()
        aside.wait_stream(torch.cuda.current_stream())
        with warnings.catch_warnings(record=True) as told, torch.cuda.stream(aside):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if self._calls == WARM else before)  # earlier ones may still set up
            try:
                round = self._iteration()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(aside)
        self._waits = any(WAITS in str(each.message) for each in told)
        return {name: value.detach() for name, value in round.items()}
