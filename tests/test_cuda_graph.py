"""An iteration as a whole: nothing in it waits for the host, it may be compiled, and it is replayed once a call."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny, victim
from torch.utils._python_dispatch import TorchDispatchMode

from dhbe.defenses import DHBE, OFFICIAL, PAPER, FastDHBE, Known, cuda_graph
from dhbe.errors import Refused
from dhbe.run_state import RunState

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.item, aten._unique2}
"""Operations whose outcome the host must see before it can go on."""


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else []
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        self.count += func.overloadpacket in WAITING or bool(masks)
        return func(*args, **(kwargs or {}))


def waits(defense) -> list[int]:
    """How often each round of a defence waits."""
    counts, rounds = [], defense.run(victim().train(), Known(), RunState())
    while True:
        with Waits() as mode:
            if next(rounds, None) is None:
                return counts
        counts.append(mode.count)


def test_what_waits_is_seen():
    with Waits() as mode:
        assert float(torch.ones(())) == 1
        assert torch.ones(2)[torch.tensor([True, False])].shape == (1,)
    assert mode.count == 2


@pytest.mark.parametrize("defense", [PAPER, OFFICIAL, DHBE(places="sample")], ids=["paper", "official", "sample"])
def test_an_iteration_of_the_paper_waits_for_nothing(defense):
    torch.manual_seed(0)
    assert waits(tiny(defense)) == [0] * tiny(defense).rounds


def test_a_student_step_of_fast_waits_for_nothing():
    torch.manual_seed(0)
    few, many = (waits(replace(tiny(FastDHBE()), student_steps=steps)) for steps in (1, 9))
    plain = tiny(FastDHBE()).survey.warm_up + 1  # a round without a look
    assert few[plain] == many[plain] < min(few[plain - 1], few[plain + 1])


def test_graphs_are_refused_where_there_are_none():
    with pytest.raises(Refused, match="`engine='graph'` needs a CUDA device"):
        replace(tiny(PAPER), engine="graph")(victim())


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_learn_the_same():
    defense = replace(tiny(PAPER), lr=1e-3)
    eager, compiled = (replace(defense, engine=engine)(victim()).state_dict() for engine in ("eager", "compile"))
    assert list(eager) == list(compiled)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


# ---- graphs, on a device that only pretends to have them


class Pretender:
    """A device that counts how often the work was done, directly or by a replay."""

    def __init__(self) -> None:
        self.done, self.captures, self.capturing, self.waits, self.debug = 0, 0, False, False, "default"
        self.fails = ""
        self.loss = torch.zeros(())

    def iteration(self) -> dict[str, torch.Tensor]:
        if not self.capturing:
            self.work()
        if self.waits and self.debug == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return {"loss": self.loss}

    def work(self) -> None:
        self.done += 1
        self.loss.fill_(self.done)

    @contextmanager
    def graph(self, graph: object, stream: object) -> Iterator[None]:
        self.capturing, self.captures = True, self.captures + 1
        try:
            yield
            if self.fails:
                raise RuntimeError(self.fails)
        finally:
            self.capturing = False


@pytest.fixture
def pretender(monkeypatch) -> Pretender:
    device = Pretender()
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def aside(stream):
        yield

    stand_ins = {
        "CUDAGraph": lambda: SimpleNamespace(replay=device.work), "graph": device.graph, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": aside, "get_sync_debug_mode": lambda: device.debug,
        "set_stream": lambda stream: None,
        "set_sync_debug_mode": lambda mode: setattr(device, "debug", mode),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return device


def test_each_call_is_one_iteration_captured_anew_when_settings_change(pretender):
    repeated = cuda_graph.CudaGraph(pretender.iteration)
    rounds = [repeated(rate)["loss"] for rate in [1.0] * 6 + [0.1] * 5]
    assert pretender.captures == 2
    assert pretender.done == 11
    assert [float(loss) for loss in rounds[cuda_graph.WARM : 6]] == [4, 5, 6]


def test_an_iteration_that_cannot_be_captured_goes_on_as_usual(pretender):
    pretender.fails = "operation not permitted when stream is capturing"
    repeated = cuda_graph.CudaGraph(pretender.iteration)
    assert [float(repeated(1.0)["loss"]) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert pretender.captures == 1


def test_memory_that_ends_in_a_capture_is_told_as_such(pretender):
    pretender.fails = "CUDA out of memory. Tried to allocate 2.00 GiB"
    repeated = cuda_graph.CudaGraph(pretender.iteration)
    for _ in range(cuda_graph.WARM):
        repeated(1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        repeated(1.0)


def test_an_iteration_that_waits_is_never_captured(pretender):
    pretender.waits = True
    repeated = cuda_graph.CudaGraph(pretender.iteration)
    for _ in range(6):
        repeated(1.0)
    assert (pretender.done, pretender.captures, pretender.debug) == (6, 0, "default")
