"""A process that fails or dies leaves none of the others waiting, and they name it."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ranks import Failing, Looking, difference, facts, fresh, run, texts, values
from torch import distributed

from visualizer.statistics import Confidence, Entropy, collect, processes
from visualizer.statistics.heartbeat import Failed, Heartbeat, Lost, Stopped

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def endless():
    [batch] = texts(1)
    while True:
        time.sleep(0.02)
        yield batch


def one_fails(rank, bad, good, how, timeout):
    model = Failing(good, how) if rank == bad else Looking()
    return facts(collect(model, endless(), Entropy(), is_share=True, timeout=timeout))


def one_dies(rank, bad, timeout, folder):
    model = Failing(2, "dies") if rank == bad else Looking()
    return facts(collect(model, texts(9), Entropy(), timeout=timeout, checkpoint=folder, every=1))


def one_dies_and_one_is_slow(rank, timeout):
    model = Failing(2, "dies") if rank == 0 else Looking()
    if rank == 1:
        model.register_forward_hook(lambda *_: time.sleep(2))
    return facts(collect(model, texts(9), Entropy(), timeout=timeout))


def one_hangs_and_one_is_slow(rank, timeout):
    model = Looking()
    if rank:
        model.register_forward_hook(lambda *_: time.sleep(60 if rank == 2 else 3))
    return facts(collect(model, texts(9), Entropy(), timeout=timeout))


def all_in_one(rank, timeout):
    model = Looking()
    model.register_forward_hook(lambda *_: time.sleep(1))
    return facts(collect(model, texts(9) if rank else [], Entropy(), is_share=True, timeout=timeout))


def one_stands_still(rank, timeout):
    if rank == 0:
        Looking.forward = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    return facts(collect(Looking(), texts(4), Entropy(), timeout=timeout))


def one_dies_waiting(rank, timeout):
    model = Looking()
    if rank == 0:
        threading.Timer(3, os._exit, [7]).start()
    if rank == 2:
        model.register_forward_hook(lambda *_: time.sleep(2))
    return facts(collect(model, texts(12), Entropy(), timeout=timeout))


def interrupted_waiting(rank, timeout):
    model = Looking()
    if rank == 0:
        threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        model.register_forward_hook(lambda *_: time.sleep(2))
    return facts(collect(model, texts(9), Entropy(), timeout=timeout))


def one_fails_merging(rank, timeout):
    def fail(*_):
        raise MemoryError("no more of it")

    if rank == 1:
        processes.gathered = fail
    return facts(collect(Looking(), texts(4), Entropy(), timeout=timeout))


def with_others(rank, what):
    statistics, model = [Entropy(), Confidence()], Looking()
    if rank == 1 and what == "order":
        statistics.reverse()
    if rank == 1 and what == "model":
        model = Looking(0.7, 2.0)
    return facts(collect(model, texts(4), *statistics))


def one_stays_away(rank, timeout):
    if rank == 1:
        time.sleep(3 * timeout)
        return None
    return facts(collect(Looking(), texts(2), Entropy(), timeout=timeout))


class TestAProcessThatFails:
    @pytest.mark.parametrize("bad", [0, 1])
    @pytest.mark.slow
    def test_ends_the_others_at_once(self, bad):
        """The others have batches without an end, and half an hour to wait."""
        ended = run(3, one_fails, bad, 0, "fails", 1800.0)
        assert isinstance(ended[bad].error, ArithmeticError)
        for rank in {0, 1, 2} - {bad}:
            assert isinstance(ended[rank].error, RuntimeError)
            assert f"rank {bad} failed, with ArithmeticError: no more of it" in str(ended[rank].error)
        assert max(one.seconds for one in ended) < 30

    @pytest.mark.parametrize("bad", [0, 1])
    @pytest.mark.slow
    def test_that_dies_is_named_by_the_others(self, bad, tmp_path):
        ended = run(3, one_dies, bad, 5.0, tmp_path / "run", has_server=bad == 0)
        assert 7 == ended[bad].code
        for rank in {0, 1, 2} - {bad}:
            message = str(ended[rank].error)
            assert isinstance(ended[rank].error, RuntimeError), message
            assert f"but rank {bad} died" in message
            assert "checkpoint" in message
            assert ended[rank].seconds < 30

    @pytest.mark.slow
    def test_that_dies_is_told_from_one_that_is_slow(self):
        ended = run(3, one_dies_and_one_is_slow, 5.0)
        for one in ended[1:]:
            assert "but rank 0 died, or gives no sign of life for 5 s" in str(one.error)
            assert one.seconds < 30

    @pytest.mark.slow
    def test_that_hangs_is_told_from_one_that_is_slow(self):
        """The slow one needs longer than the time, and it gets on meanwhile."""
        ended = run(3, one_hangs_and_one_is_slow, 5.0, seconds=15)
        for one in ended[:2]:
            assert "rank 2 hangs: it did no batch within 5 s" in str(one.error)
            assert "rank 0" not in str(one.error).partition("but")[2]

    @pytest.mark.slow
    def test_whoever_is_done_waits_for_one_that_gets_on(self):
        """For longer than the time that one batch may take."""
        [none, whole] = values(2, all_in_one, 3.0)
        assert difference(none, whole) == 0
        assert 27 == whole.samples

    @pytest.mark.slow
    def test_that_stands_still_with_the_store_in_it(self):
        """Its sockets stay open, and whoever asks the store waits for ever."""
        ended = run(2, one_stands_still, 5.0, has_server=True, seconds=15)
        assert "rank 0 died or hangs: torch.distributed's store" in str(ended[1].error)
        assert ended[1].seconds < 20

    @pytest.mark.parametrize(("what", "said"), [("order", "different statistics"), ("model", "different models")])
    @pytest.mark.slow
    def test_or_does_something_else(self, what, said):
        for one in run(2, with_others, what):
            assert isinstance(one.error, ValueError)
            assert said in str(one.error)

    @pytest.mark.slow
    def test_while_another_waits_for_one_more(self):
        """The first has come, waits for the third, and is killed there: the third is well."""
        ended = run(3, one_dies_waiting, 5.0)
        for one in ended[1:]:
            assert "but rank 0 died" in str(one.error), one
            assert "rank 2" not in str(one.error).partition("but")[2]

    @pytest.mark.slow
    def test_an_interruption_ends_the_waiting(self):
        ended = run(2, interrupted_waiting, 60.0)
        assert isinstance(ended[0].error, KeyboardInterrupt)
        assert ended[0].seconds < 20
        assert "rank 0 failed, with KeyboardInterrupt" in str(ended[1].error)

    def test_while_they_merge(self):
        ended = run(2, one_fails_merging, 20.0)
        assert isinstance(ended[1].error, MemoryError)
        assert "rank 1 failed, with MemoryError: no more of it" in str(ended[0].error)

    @pytest.mark.slow
    def test_whose_reason_no_file_would_take(self):
        ended = run(2, one_fails, 1, 2, "at length", 20.0)
        assert "rank 1 failed, with ArithmeticError: no more of it\\ud800" in str(ended[0].error)
        assert len(str(ended[0].error)) < 3000

    def test_that_is_interrupted_ends_the_others(self):
        ended = run(2, one_fails, 1, 2, "interrupted", 20.0)
        assert isinstance(ended[1].error, KeyboardInterrupt)
        assert "rank 1 failed, with KeyboardInterrupt" in str(ended[0].error)
        assert ended[0].seconds < 30

    @pytest.mark.slow
    def test_that_never_collects(self):
        ended = run(2, one_stays_away, 5.0)
        assert "rank 0 of 2 is here, but rank 1 did not come within 5 s" in str(ended[0].error)

    @pytest.mark.slow
    def test_a_damaged_checkpoint_of_one(self, tmp_path):
        values(2, fresh, tmp_path)
        file = tmp_path / "rank-1.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        ended = run(2, fresh, tmp_path)
        assert "remove it" in str(ended[1].error)
        assert "rank 1 failed, with FileFormatError" in str(ended[0].error)


class Line:
    """A process's connection to the store, which can be cut."""

    def __init__(self, store):
        self.store, self.is_cut = store, False

    def __getattr__(self, name):
        if self.is_cut:
            raise ConnectionError("nobody answers")
        return getattr(self.store, name)


@pytest.fixture
def lines():
    store = distributed.HashStore()
    return [Line(store) for _ in range(3)]


@pytest.fixture
def beats(lines):
    """Three processes' heartbeats, here in one process."""
    made = [Heartbeat(line, rank, 3, timeout=5.0) for rank, line in enumerate(lines)]
    yield made
    for one in made:
        one.close()


class TestHeartbeat:
    def test_all_meet_as_often_as_they_like(self, beats):
        for _ in range(3):
            with ThreadPoolExecutor(3) as pool:
                assert [None] * 3 == [*pool.map(Heartbeat.meet, beats)]

    def test_trouble_stops_the_others_at_their_next_step(self, beats):
        beats[0].step()
        beats[2].tell(ArithmeticError("too hot"))
        deadline = time.monotonic() + 10
        with pytest.raises(Stopped):
            while time.monotonic() < deadline:
                beats[0].step()
                time.sleep(0.05)
        with pytest.raises(Failed, match="rank 2 failed, with ArithmeticError: too hot"):
            beats[0].meet()

    @pytest.mark.slow
    def test_silence_is_told_from_slowness(self, beats, lines):
        """The second gives no sign any more, the third gets on."""
        time.sleep(1)  # all have given a sign
        lines[1].is_cut = True
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(beats[0].meet)
            while not waiting.done():
                beats[2].step()
                time.sleep(0.2)
        said = "rank 0 of 3 is here, but rank 1 died, or gives no sign of life for 5 s"
        assert isinstance(waiting.exception(), Lost) and said in str(waiting.exception())

    @pytest.mark.slow
    def test_one_that_does_no_batch_hangs(self, beats):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(beats[0].meet)
            while not waiting.done():
                beats[1].step()
                time.sleep(0.2)
        assert "is here, but rank 2 hangs: it did no batch within 5 s" in str(waiting.exception())

    def test_without_a_store_it_is_the_first_process_that_died(self, beats, lines):
        lines[2].is_cut = True
        with pytest.raises(Lost, match="rank 2 of 3 is here, but rank 0 died or hangs"):
            beats[2].meet()
        with pytest.raises(Stopped):
            beats[2].step()

    def test_it_ends_soon(self, beats):
        start = time.monotonic()
        beats[0].close()
        beats[1].linger(0.2)
        assert time.monotonic() - start < 5
        assert "visualizer heartbeat" in {thread.name for thread in threading.enumerate()}
