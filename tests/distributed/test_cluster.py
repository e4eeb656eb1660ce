"""Ranks that torchrun or srun started take part in every job that the first of them launches, and end with it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cluster_script
import pytest

from cs336_systems.distributed.cluster import World, world
from cs336_systems.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node",
    "MASTER_PORT": "12",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x1),2,1",
    "MASTER_ADDR": "node",
    "MASTER_PORT": "12",
}
WORKING = {
    "found": [[6.0] * 3, [3.0] * 2, [1.0]],
    "reports": [[rank, number] for rank in range(3) for number in range(2)],
}


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    path = os.pathsep.join([str(Path(cluster_script.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def under_torchrun(way: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """With a place to meet that torchrun finds for itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += [str(cluster_script.__file__), way]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("variables", [TORCHRUN, SLURM])
def test_the_variables_of_torchrun_and_of_srun_say_which_rank_this_is(variables: dict[str, str]) -> None:
    assert world(variables) == World(3, 4, 1, 2, "node", 12)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [("4(x2)", "1", 4), ("4(x2),3", "2", 3), ("2,1(x10)", "5", 1), ("3", "0", 3), ("", "0", 4), ("3", "7", 4)],
)
def test_the_tasks_of_this_node_are_read_as_slurm_writes_them(tasks: str, node: str, expected: int) -> None:
    found = world({**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node})
    assert found is not None
    assert found.ranks_here == expected


def test_a_process_that_nobody_started_as_a_rank_is_none() -> None:
    assert world({}) is None
    assert world({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None, "a batch script is no rank"


@pytest.mark.parametrize("variables", [TORCHRUN, SLURM])
@pytest.mark.parametrize("missing", ["MASTER_PORT", "WORLD_SIZE or SLURM_NTASKS", "RANK or SLURM_PROCID"])
def test_variables_that_are_missing_or_no_numbers_are_named(variables: dict[str, str], missing: str) -> None:
    (name,) = [each for each in missing.split(" or ") if each in variables]
    with pytest.raises(UserError, match=name):
        world({**variables, name: "many"})
    if "PROCID" not in name and name != "RANK":  # without those nobody started it as a rank
        with pytest.raises(UserError, match=f"{name} is 'not set'"):
            world({other: value for other, value in variables.items() if other != name})


@pytest.mark.distributed
def test_torchruns_ranks_do_jobs_of_several_sizes_and_end(environ: dict[str, str]) -> None:
    done = under_torchrun("working", environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == WORKING


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("too many", "error: the job needs 4 ranks, but 3 were started"),
        ("a users mistake", "error: expected an even batch of all 3 ranks"),
        ("raising", "ArithmeticError: the numbers are wrong"),
    ],
)
def test_what_goes_wrong_under_torchrun_is_told_and_ends_all_ranks(
    environ: dict[str, str], way: str, says: str
) -> None:
    done = under_torchrun(way, environ)
    assert done.returncode != 0
    assert says in done.stderr


@contextlib.contextmanager
def under_srun(way: str, environ: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Three tasks, which leave it to the first to keep the place where they meet."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    variables = {"SLURM_NTASKS": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tasks = [
        subprocess.Popen(
            [sys.executable, cluster_script.__file__, way],
            env={**environ, **variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        yield tasks
    finally:
        for each in tasks:
            each.kill()
            each.communicate()


@pytest.mark.distributed
@pytest.mark.parametrize(("way", "says"), [("working", [WORKING]), ("from a child", [[6.0] * 3] * 2)])
def test_sruns_tasks_do_jobs_of_the_leader_and_of_its_children(
    environ: dict[str, str], way: str, says: list[object]
) -> None:
    with under_srun(way, environ) as tasks:
        outputs = [each.communicate() for each in tasks]
        assert [each.returncode for each in tasks] == [0, 0, 0], outputs
    assert [json.loads(line) for line in outputs[0][0].splitlines()] == says
    assert [output for output, _ in outputs[1:]] == ["", ""], "only the leader prints"


@pytest.mark.distributed
def test_what_ranks_reported_before_the_leader_failed_is_there(environ: dict[str, str]) -> None:
    done = under_torchrun("reports of what failed", environ)
    assert done.returncode != 0
    reported = json.loads(done.stdout)
    assert 0 in reported
    assert set(reported) <= {0, 1, 2}
