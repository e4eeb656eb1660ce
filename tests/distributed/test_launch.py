"""A launch gives what its ranks found or one clear error: it always ends, leaves no process and loses no report."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import rank_workers as workers
import torch

from cs336_systems.distributed.launch import TIMEOUT_S, RankFailed, launch
from cs336_systems.errors import UserError

pytestmark = pytest.mark.distributed
SHORT_S = 3.0
"""A timeout for tests in which a rank hangs."""


def ranks_here() -> list[psutil.Process]:
    """The rank processes of this one: on Linux the children of the server that forks them, elsewhere its own."""
    children = psutil.Process().children()
    found = [each for child in children for each in child.children()] if sys.platform == "linux" else children
    return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    yield
    assert ranks_here() == []


# What comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gives_its_result_in_the_order_of_ranks(world_size: int) -> None:
    assert launch(workers.summed, 0.5, world_size=world_size) == [sum(range(1, world_size + 1)) / 2] * world_size


def test_ranks_are_processes_of_one_thread_that_listen_on_the_loopback_interface_alone() -> None:
    found = launch(workers.described, world_size=2)
    assert [each["rank"] for each in found] == [0, 1]
    assert len({each["pid"] for each in found} | {os.getpid()}) == 3
    for each in found:
        assert each["world_size"] == (2, 2)
        assert each["backend"] == ("gloo", "gloo")
        assert (each["threads"], each["device"]) == (1, "cpu")
        assert set(each["listening"]) <= {"127.0.0.1", "::1"}
    assert any(each["listening"] for each in found), "the ranks meet by listening, here and nowhere else"


@pytest.mark.gpu
def test_over_nccl_each_rank_has_a_gpu_of_its_own() -> None:
    ranks = torch.cuda.device_count()
    found = launch(workers.described, world_size=ranks, backend="nccl")
    assert [each["device"] for each in found] == [f"cuda:{rank}" for rank in range(ranks)]
    assert {each["backend"] for each in found} == {("nccl", "nccl")}
    assert launch(workers.summed, 0.5, world_size=ranks, backend="nccl") == [sum(range(1, ranks + 1)) / 2] * ranks


def test_threads_per_rank_are_as_many_as_asked_for_and_the_parents_stay() -> None:
    before = torch.get_num_threads()
    assert [each["threads"] for each in launch(workers.described, world_size=2, threads=2)] == [2, 2]
    assert torch.get_num_threads() == before


def test_reports_reach_the_parent_in_the_order_of_each_rank() -> None:
    got: list[tuple[int, Any]] = []
    assert launch(workers.reporting, 100, world_size=2, on_report=lambda *report: got.append(report)) == ["done"] * 2
    for rank in (0, 1):
        assert [value for sender, value in got if sender == rank] == [(rank, number) for number in range(100)]


def test_a_result_larger_than_a_pipe_comes_whole() -> None:
    for found in launch(workers.returning, "a megabyte", world_size=2):
        torch.testing.assert_close(found, torch.arange(250_000.0), rtol=0, atol=0)


def test_launches_at_the_same_time_do_not_meet() -> None:
    found: dict[int, list[float]] = {}

    def start(value: int) -> None:
        found[value] = launch(workers.summed, value, world_size=2)

    threads = [threading.Thread(target=start, args=(value,)) for value in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {value: [3.0 * value] * 2 for value in range(4)}


def test_while_one_rank_says_that_it_is_alive_another_may_wait_for_it() -> None:
    found = launch(workers.working_while_another_waits, 10, SHORT_S / 5, world_size=2, timeout_s=SHORT_S)
    assert found == ["done"] * 2


def test_ranks_may_end_while_the_parent_is_busy_with_what_they_reported() -> None:
    assert launch(workers.reporting_once, world_size=2, on_report=lambda *_: time.sleep(0.7)) == [0, 1]


def test_a_rank_that_says_it_is_alive_may_take_longer_than_the_timeout() -> None:
    assert launch(workers.slow_but_alive, 8, SHORT_S / 6, world_size=2, timeout_s=SHORT_S) == ["done"] * 2


# What goes wrong ---------------------------------------------------------------------------------------------------

WAYS = {
    "raising": r"failed with ArithmeticError: the numbers are wrong",
    "an exception that cannot be sent": r"failed with RuntimeError: Local: of a class that nobody can import",
    "a kill": r"was killed by SIGKILL",
    "leaving": r"ended with exit status 3 and without a result",
    "exiting": r"failed with SystemExit: no more",
    "hanging": r"hung: no rank was heard of for",
    "stopping": r"hung: no rank was heard of for",
}


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_ends_badly_is_named_and_what_was_reported_is_there(way: str, who: int) -> None:
    got: list[tuple[int, Any]] = []
    began = time.monotonic()
    with pytest.raises(RankFailed, match=f"^rank {who} of 2 {WAYS[way]}") as caught:
        launch(workers.failing, who, way, world_size=2, timeout_s=SHORT_S, on_report=lambda *each: got.append(each))
    assert caught.value.rank == who
    assert (who, "before") in got
    assert caught.value.signal_name == ("SIGKILL" if way == "a kill" else None)
    assert caught.value.log.startswith(f"--- rank {who}\n")
    assert caught.value.log in caught.value.__notes__
    if way not in ("hanging", "stopping"):
        assert time.monotonic() - began < TIMEOUT_S
    assert launch(workers.summed, 1.0, world_size=2) == [3.0, 3.0]


@pytest.mark.parametrize(("way", "line"), [("raising", "raise ArithmeticError"), ("hanging", "in hanging_here")])
def test_the_log_has_the_stack_of_the_rank_at_fault_first(way: str, line: str) -> None:
    with pytest.raises(RankFailed) as caught:
        launch(workers.failing, 1, way, world_size=2, timeout_s=SHORT_S)
    first, _, second = caught.value.log.partition("--- rank 0\n")
    assert line in first
    assert line not in second


def test_all_ranks_that_hang_are_named() -> None:
    with pytest.raises(RankFailed, match=r"^ranks 0 and 1 hung"):
        launch(workers.hanging, world_size=2, timeout_s=SHORT_S)


def test_a_users_mistake_that_all_ranks_find_is_one_error_without_a_log() -> None:
    with pytest.raises(UserError, match=r"^expected an even batch of all 2 ranks$") as caught:
        launch(workers.of_a_users_mistake, world_size=2)
    assert not isinstance(caught.value, RankFailed)


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank() -> None:
    with pytest.raises(RankFailed, match=r"rank 0 of 1 failed with .*pickle"):
        launch(workers.returning, "nothing that can be sent", world_size=1)


def test_a_report_that_the_parent_cannot_use_ends_the_ranks() -> None:
    def refuse(rank: int, value: Any) -> None:
        raise OSError(f"no room for {value} of {rank}")

    with pytest.raises(OSError, match="no room"):
        launch(workers.reporting_steps_for_ever, world_size=2, on_report=refuse)


@pytest.mark.parametrize("way", ["returning", "raising", "a kill", "hanging"])
def test_what_a_rank_has_started_ends_with_it(way: str) -> None:
    children: list[int] = []
    try:
        launch(
            workers.with_a_child, way, world_size=2, timeout_s=SHORT_S, on_report=lambda _, pid: children.append(pid)
        )
    except RankFailed:
        assert way != "returning"
    assert len(children) == 2
    assert wait_until(lambda: not any(map(is_running, children)))


def test_an_error_in_words_of_communication_is_still_its_ranks() -> None:
    with pytest.raises(RankFailed, match=r"^rank 0 of 2 failed with RuntimeError: connection to the database"):
        launch(workers.refused_elsewhere, world_size=2)


def test_what_a_rank_raises_is_told_before_what_it_has_begun_is_over() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed with ArithmeticError"):
        launch(workers.raising_while_reducing, world_size=2)
    assert time.monotonic() - began < TIMEOUT_S / 2


def test_a_rank_that_is_stopped_within_a_message_holds_nobody_up() -> None:
    with pytest.raises(RankFailed, match="hung"):
        launch(workers.stopped_within_a_message, world_size=1, timeout_s=SHORT_S)


def test_a_rank_that_never_ceases_to_report_hides_no_others_death() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 was killed by SIGKILL"):
        launch(workers.reporting_while_another_is_killed, world_size=2)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], longest_s: float = 30.0) -> bool:
    until = time.monotonic() + longest_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment_ends_the_launch_and_the_next_one_works(seed: int) -> None:
    chance = random.Random(seed)
    delay_s, who = chance.choice([0.0, chance.uniform(0, 0.1), chance.uniform(0, 0.5)]), chance.randrange(2)
    got: list[tuple[int, int]] = []
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(ranks_here()) == 2)
        time.sleep(delay_s)
        killed.append(ranks_here()[who].pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank \d of 2 was killed by SIGKILL") as caught:
        launch(workers.reporting_steps_for_ever, world_size=2, on_report=lambda *each: got.append(each))
    assert time.monotonic() - began < TIMEOUT_S
    killer.join()
    assert {pid for rank, pid in got if rank == caught.value.rank} <= set(killed), "the one that was killed is named"
    assert not any(map(is_running, {pid for _, pid in got}))
    assert launch(workers.summed, 1.0, world_size=2) == [3.0, 3.0]


def test_a_long_path_for_temporary_files_is_no_hindrance(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    script = tmp_path / "parent.py"
    script.write_text(PARENT.replace("rank_workers.telling_a_file, sys.argv[1]", "rank_workers.summed, 1.0"))
    path = os.pathsep.join([str(Path(workers.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)}
    ended = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert list(folder.iterdir()) == []


# The parent --------------------------------------------------------------------------------------------------------

PARENT = """
import sys
import rank_workers
from cs336_systems.distributed.launch import launch
if __name__ == "__main__":
    launch(rank_workers.telling_a_file, sys.argv[1], world_size=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(workers.__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE
    ) as parent:
        assert wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        pids = [int(each.read_text()) for each in tmp_path.glob("*.pid")]
        assert all(map(is_running, pids))
        parent.send_signal(how)
        _, errors = parent.communicate()
    assert parent.returncode != 0
    assert wait_until(lambda: not any(map(is_running, pids)))
    assert ("KeyboardInterrupt" in errors.decode()) == (how == signal.SIGINT)


def test_a_script_that_starts_ranks_whenever_it_is_imported_is_told_how_not_to(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.replace('if __name__ == "__main__":', "if True:"))
    path = os.pathsep.join([str(Path(workers.__file__).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    last = ended.stderr[ended.stderr.rindex("RankFailed: ") :].splitlines()[0]
    assert "before it began" in last
    assert 'under `if __name__ == "__main__":`' in last


# What cannot be ----------------------------------------------------------------------------------------------------


def test_a_function_that_no_other_process_finds_is_refused() -> None:
    def local(_: Any) -> None: ...

    for worker in (local, lambda _: None, print, type("Made", (), {})()):
        with pytest.raises(UserError, match="expected a function at the top of a module"):
            launch(worker, world_size=1)


def test_arguments_that_cannot_be_sent_are_refused() -> None:
    with pytest.raises(UserError, match="the arguments of summed cannot be sent"):
        launch(workers.summed, lambda: None, world_size=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"world_size": 0}, "at least 1 rank, found 0"),
        ({"world_size": 2, "backend": "glo"}, "unknown backend 'glo': did you mean 'gloo'"),
        ({"world_size": 2, "timeout_s": 0}, "a positive timeout"),
        ({"world_size": 2, "threads": 0}, "a thread per rank"),
        ({"world_size": 99, "backend": "nccl"}, "NCCL needs a GPU for each"),
    ],
)
def test_an_impossible_job_is_refused_before_anything_is_started(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        launch(workers.summed, 1.0, **arguments)


def test_a_system_that_starts_no_more_processes_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = BaseProcess.start, 0

    def fail_at_the_third(process: BaseProcess) -> None:
        nonlocal started
        started += 1
        if started == 3:
            raise BlockingIOError("no more processes")
        start(process)

    monkeypatch.setattr(BaseProcess, "start", fail_at_the_third)
    with pytest.raises(BlockingIOError):
        launch(workers.summed, 1.0, world_size=3)
    assert started == 3
