"""Threads share the tiles of a volume: every task once, results in order, errors passed on, and forks survived."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from light_import import LIGHT_IMPORT
from torch import Tensor

from monai_iou import InstanceIoULoss, IoUCELoss, IoUFocalLoss, IoULoss, LovaszSoftmaxLoss
from monai_iou.voxels import torch_threads
from monai_iou.voxels.tiling import in_threads

OF_TORCH = pytest.param("torch's", marks=pytest.mark.skipif(not torch_threads._openmp(), reason="no OpenMP here"))


@pytest.fixture(autouse=True, params=["ours", OF_TORCH])
def four_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Threads of our own, as on a busy machine, and those of torch."""
    monkeypatch.setattr(torch_threads, "cores_suffice", lambda: request.param == "torch's")
    allowed = torch.get_num_threads()
    torch.set_num_threads(4)
    yield request.param
    torch.set_num_threads(allowed)


def test_results_come_in_the_order_of_the_tasks_and_each_task_is_done_once() -> None:
    done: list[int] = []

    def work(task: int) -> int:
        time.sleep(0.001 * (task % 3))
        done.append(task)
        return task * task

    assert in_threads(work, range(50)) == [task * task for task in range(50)]
    assert sorted(done) == list(range(50))
    assert in_threads(work, []) == []


def test_the_caller_and_helpers_work_at_once_without_gradients() -> None:
    together = threading.Barrier(4)

    def work(_: int) -> tuple[int, bool]:
        together.wait(30)
        return threading.get_ident(), torch.is_grad_enabled()

    for _ in range(2):
        names, gradients = zip(*in_threads(work, range(4)), strict=True)
        assert len(set(names)) == 4
        assert threading.get_ident() in names
        assert set(gradients) == {False}
        assert torch.get_num_threads() == 4
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("inference", [False, True])
def test_helpers_are_in_the_inference_mode_of_the_caller(inference: bool) -> None:
    together = threading.Barrier(4)
    with torch.inference_mode(inference):
        shared = torch.zeros(4)

    def work(task: int) -> tuple[bool, bool]:
        together.wait(30)
        shared[task] = 1
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode(inference):
        assert set(in_threads(work, range(4))) == {(inference, False)}
        assert torch.is_inference_mode_enabled() == inference
    assert torch.is_grad_enabled()
    assert shared.tolist() == [1, 1, 1, 1]


LOSSES = [
    IoULoss(softmax=True, ignore_index=2),
    IoUCELoss(softmax=True),
    IoUFocalLoss(softmax=True),
    LovaszSoftmaxLoss(softmax=True),
    InstanceIoULoss(softmax=True),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("classes", [2, 3])
def test_losses_of_inference_mode_are_those_outside(loss: torch.nn.Module, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, 48, 64, 64, generator=generator)
    labels = (torch.rand(1, 1, 48, 64, 64, generator=generator) > 0.999).to(torch.uint8)
    with torch.no_grad():
        expected = loss(logits, labels)
    for _ in range(3):  # which thread is the first to come is chance
        with torch.inference_mode():
            assert torch.equal(loss(logits.clone(), labels.clone()), expected)


def test_the_error_of_a_task_is_raised_and_the_rest_is_left() -> None:
    begun: list[int] = []

    def work(task: int) -> None:
        begun.append(task)
        time.sleep(0.01)
        if task == 2:
            message = "the third task"
            raise ArithmeticError(message)

    with pytest.raises(ArithmeticError, match="the third task"):
        in_threads(work, range(1000))
    assert len(begun) < 1000
    assert torch.get_num_threads() == 4
    assert in_threads(str, range(3)) == ["0", "1", "2"]


def test_what_a_task_held_is_freed_with_its_error() -> None:
    held: list[weakref.ref[Tensor]] = []

    def work(task: int) -> None:
        values = torch.zeros(10)
        held.append(weakref.ref(values))
        if task == 1:
            message = "the second task"
            raise ArithmeticError(message)

    gc.disable()
    try:
        with contextlib.suppress(ArithmeticError):
            in_threads(work, range(4))
        assert [values() for values in held] == [None] * len(held)
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to a thread here")
def test_an_interrupt_while_the_caller_waits_leaves_torch_its_threads() -> None:
    caller = threading.main_thread().ident
    assert caller == threading.get_ident()
    together = threading.Barrier(2)

    def work(_: int) -> None:
        together.wait(30)
        if threading.get_ident() != caller:
            time.sleep(0.05)
            signal.pthread_kill(caller, signal.SIGINT)
            time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            in_threads(work, range(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.get_num_threads() == 4
    assert in_threads(str, range(3)) == ["0", "1", "2"]


@pytest.mark.skipif(not torch_threads._openmp(), reason="no OpenMP here")
def test_an_interrupt_among_threads_of_torch_is_raised() -> None:
    """A function that C calls has nobody to raise it to."""
    caller, others = threading.get_ident(), list[int]()

    def work() -> None:
        if threading.get_ident() == caller:
            raise KeyboardInterrupt
        others.append(threading.get_ident())

    for _ in range(2):
        others.clear()
        with pytest.raises(KeyboardInterrupt):
            torch_threads.run(work)
        assert len(set(others)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("four_threads", ["ours"], indirect=True)  # the program chooses its threads itself
def test_a_program_that_ends_computes_losses_without_helpers() -> None:
    """Python starts no thread any more when it calls what `atexit` has been told."""
    script = (
        f"import atexit, torch\n{LIGHT_IMPORT}from monai_iou.voxels import torch_threads, voxel_sums\n"
        "torch_threads.cores_suffice = lambda: False; torch.set_num_threads(2)\n"
        "def sums(): return voxel_sums(torch.zeros(1, 2, 300_000), torch.ones(1, 1, 300_000)).rows\n"
        "used = sums(); atexit.register(lambda: print(torch.equal(sums(), used)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True", done.stderr


def test_tasks_that_share_tasks_themselves_do_not_wait_for_each_other() -> None:
    def outer(task: int) -> list[int]:
        torch.set_num_threads(4)  # so that the inner call asks for helpers, who are all busy
        return in_threads(lambda inner: 10 * task + inner, range(6))

    assert in_threads(outer, range(20)) == [[10 * task + inner for inner in range(6)] for task in range(20)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    """Data loaders fork, and the threads of their parent do not exist in them."""
    in_threads(str, range(8))
    child = os.fork()
    if child == 0:
        os._exit(0 if in_threads(str, range(8)) == [str(task) for task in range(8)] else 1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, "the forked process waits for threads that it does not have"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status[1]) == 0


def test_operations_of_a_task_are_not_split_even_if_there_is_but_one() -> None:
    values = torch.rand(20, 300_007, generator=torch.Generator().manual_seed(0))
    split = [row.sum().item() for row in values]
    torch.set_num_threads(1)
    whole = [row.sum().item() for row in values]
    torch.set_num_threads(4)
    assert split != whole
    for tasks in (1, 20):
        assert in_threads(lambda row: values[row].sum().item(), range(tasks)) == whole[:tasks]
        assert torch.get_num_threads() == 4


def test_threads_of_torch_are_taken_where_they_are_free(four_threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def run(work: Callable[[], None]) -> None:
        runs.append(torch.get_num_threads())
        work()

    monkeypatch.setattr(torch_threads, "run", run)
    for threads, tasks in ((4, 6), (4, 1), (1, 6), (9, 6)):  # with nine, most would wait for Python's lock
        torch.set_num_threads(threads)
        assert in_threads(str, range(tasks)) == [str(task) for task in range(tasks)]
    assert runs == ([4] if four_threads == "torch's" else [])


@pytest.mark.skipif(not torch_threads._openmp(), reason="no OpenMP here")
def test_threads_of_torch_are_left_alone_where_they_are_not_what_they_seem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_threads, "cores_suffice", lambda: True)
    assert torch_threads.are_free()
    for name, value in (("_PROCESS", 1), ("_openmp", lambda: None), ("cores_suffice", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch_threads, name, value)
            assert not torch_threads.are_free()
    with monkeypatch.context() as patch:  # the library of another package, which torch told nothing
        patch.setattr(torch, "get_num_threads", lambda: 5)
        assert not torch_threads.are_free()


@pytest.mark.parametrize("system", ["win32", "darwin", "linux"])
def test_a_system_without_such_a_library_is_answered_by_none(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: None) -> object:
        if system == "linux":
            return object()  # a C library without OpenMP
        message = "asked for a C library"
        raise AssertionError(message)

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", none)
    assert torch_threads._openmp.__wrapped__() is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [("0.1 0.2 0.3 2/300 99", True), ("9 9 9 3/300 99", False), ("", False), ("0 0 0 ?/9 1", False), (None, False)],
)
def test_the_system_says_whether_a_thread_waits(
    text: str | None, answer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    file = tmp_path / "loadavg"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(torch_threads, "_LOAD", file)
    monkeypatch.setattr(torch_threads, "_CORES", 2)
    assert torch_threads.cores_suffice() == answer
