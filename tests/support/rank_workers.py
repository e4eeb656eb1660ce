"""What ranks do in tests of launching: well, badly, and not at all. Importable, as every worker function must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from cs336_systems.distributed.rank import Rank
from cs336_systems.errors import UserError

LONG_S = 600


def summed(rank: Rank, value: float) -> float:
    """The sum of everyone's `value` times rank plus one."""
    x = torch.tensor([value * (rank.rank + 1)], dtype=torch.float64, device=rank.device)
    dist.all_reduce(x)
    return float(x)


def described(rank: Rank) -> dict[str, Any]:
    """What a rank finds around it."""
    listening = [each.laddr.ip for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    return {
        "rank": rank.rank,
        "world_size": (rank.world_size, dist.get_world_size()),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "backend": (rank.backend, dist.get_backend()),
        "device": str(rank.device),
        "listening": listening,
    }


def reporting(rank: Rank, times: int) -> str:
    for number in range(times):
        rank.report((rank.rank, number))
    return "done"


def reporting_steps_for_ever(rank: Rank) -> None:
    """Steps that communicate, each of them reported by all."""
    x = torch.ones(1000)
    while True:
        dist.all_reduce(x)
        x.fill_(1.0)
        rank.report(os.getpid())


def failing(rank: Rank, who: int, way: str) -> None:
    """One rank reports and ends in some way, while the others wait for it in a collective."""
    rank.report("before")
    if rank.rank == who:
        end_by(way)
    dist.all_reduce(torch.ones(1))


def end_by(way: str) -> None:
    if way == "raising":
        raise ArithmeticError("the numbers are wrong")
    if way == "an exception that cannot be sent":
        raise type("Local", (Exception,), {})("of a class that nobody can import")
    if way == "no memory":
        torch.empty(2**60)
    if way == "a kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "leaving":
        os._exit(3)
    if way == "exiting":
        sys.exit("no more")
    if way == "stopping":
        os.kill(os.getpid(), signal.SIGSTOP)
    hanging_here()


def hanging_here() -> None:
    time.sleep(LONG_S)


def hanging(rank: Rank) -> None:
    del rank
    hanging_here()


def of_a_users_mistake(rank: Rank) -> None:
    raise UserError(f"expected an even batch of all {rank.world_size} ranks")


def slow_but_alive(rank: Rank, times: int, pause_s: float) -> str:
    for _ in range(times):
        time.sleep(pause_s)
        rank.alive()
    return "done"


def returning(rank: Rank, way: str) -> Any:
    """A result that cannot be sent, or one of a megabyte."""
    del rank
    return (lambda: None) if way == "nothing that can be sent" else torch.arange(250_000.0)


def with_a_child(rank: Rank, way: str) -> None:
    """A child process that would outlive its parent; then this rank ends in some way."""
    child = subprocess.Popen([sys.executable, "-S", "-c", f"import time; time.sleep({LONG_S})"])
    rank.report(child.pid)
    if way != "returning":
        end_by(way)


def working_while_another_waits(rank: Rank, times: int, pause_s: float) -> str:
    """One rank works on and says so; the other has nothing to say, since it waits for it."""
    if rank.rank == 0:
        slow_but_alive(rank, times, pause_s)
    dist.barrier()
    return "done"


def refused_elsewhere(rank: Rank) -> None:
    """An error that has nothing to do with the ranks, in words that might."""
    if rank.rank == 0:
        raise RuntimeError("connection to the database refused, timed out")
    slow_but_alive(rank, LONG_S, 1.0)


def raising_while_reducing(rank: Rank) -> None:
    """A reduction is under way that the other never joins."""
    if rank.rank == 0:
        hanging_here()
    dist.all_reduce(torch.ones(10), async_op=True)
    raise ArithmeticError("the numbers are wrong")


def stopped_within_a_message(rank: Rank) -> None:
    """Stopped while it sends more than a pipe holds."""
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    while True:
        rank.report(bytes(50_000_000))


def reporting_while_another_is_killed(rank: Rank) -> None:
    """One reports without a pause, the other dies."""
    if rank.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        rank.report(None)


def reporting_once(rank: Rank) -> int:
    rank.report(None)
    return rank.rank


def telling_a_file(rank: Rank, folder: str) -> None:
    """Its pid in a file, and then nothing more."""
    Path(folder, f"{rank.rank}.partial").write_text(str(os.getpid()))
    Path(folder, f"{rank.rank}.partial").rename(Path(folder, f"{rank.rank}.pid"))
    dist.barrier()
    hanging_here()
