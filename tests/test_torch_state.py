"""What engines change of torch is the process's: however they overlap, the caller finds it as it was."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ddengine.torch_state import drawing_weights, working

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def found():
    """Settings that no engine would choose, and the test's own restored."""
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(2)
    cudnn.deterministic, cudnn.benchmark = False, True
    yield lambda: (torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark)
    torch.set_num_threads(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.parametrize("first_out", [0, 1])
def test_engines_that_overlap_put_back_what_the_first_one_found(found, first_out):
    turn = [threading.Event() for _ in range(2)]
    inside = [threading.Event() for _ in range(2)]
    state = torch.random.get_rng_state()

    def work(which):
        with working(CUDA if which else CPU, one_thread=True):
            seen = found()
            inside[which].set()
            assert turn[which].wait(20)
        return seen

    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for which in range(2):  # one enters after the other
            jobs.append(pool.submit(work, which))
            assert inside[which].wait(20)
        for which in (first_out, 1 - first_out):
            turn[which].set()
            jobs[which].result()
        assert jobs[0].result()[0] == 1 and jobs[1].result()[1:] == (True, False)
        assert {pool.submit(torch.get_num_threads).result() for _ in range(4)} == {2}
    assert found() == (2, False, True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_edit_within_an_edit_ends_with_the_outer_one(found):
    with working(CPU, one_thread=True):
        with working(CPU, one_thread=True):
            pass
        assert found()[0] == 1
    with pytest.raises(ZeroDivisionError), working(CPU, one_thread=True):
        raise ZeroDivisionError
    assert found() == (2, False, True)


def test_weights_are_drawn_alone_and_from_their_seed():
    state = torch.random.get_rng_state()

    def drawn(seed):
        with drawing_weights(seed):
            return torch.stack([torch.rand(4) for _ in range(200)])

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(drawn, [3, 4] * 8))
    assert all(torch.equal(one, drawn(3 + place % 2)) for place, one in enumerate(together))
    assert torch.equal(torch.random.get_rng_state(), state)
