"""Locks in a forked child."""

import os
import signal
import threading

import pytest

from visualizer.store import ForkSafeLock
from visualizer.store.locks import is_current, this_thread


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # it is what is tested
@pytest.mark.parametrize("holder", ["another thread", "this thread", "nobody"])
def test_a_forked_child_can_take_it(holder):
    lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            lock.depth += 1
            held.set()
            done.wait(60)
            lock.depth -= 1

    thread = threading.Thread(target=hold)
    if holder == "another thread":
        thread.start()
        assert held.wait(60)
    elif holder == "this thread":
        lock.acquire()
        lock.depth += 1
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            with lock:  # a lock that stays held kills the child
                os._exit(0 if lock.depth == (1 if holder == "this thread" else 0) else 1)
        finally:
            os._exit(2)
    done.set()
    if holder == "another thread":
        thread.join()
    assert 0 == os.waitpid(child, 0)[1]


def test_whoever_holds_it_can_take_it_again_and_nobody_else():
    lock, taken = ForkSafeLock(), []
    with lock, lock:
        thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert [False] == taken
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_thread_is_known_by_its_number():
    numbers, answers = [], []

    def ask():
        numbers.append(this_thread())
        answers.append([is_current[number]() for number in numbers])

    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    ask()
    assert [[True], [False, True], [True, False, True]] == answers
    assert threading.get_ident() == numbers[0] == numbers[2] != numbers[1]
