"""A Ray cluster on this machine whose nodes are real processes, to be frozen and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omni_convert.converter.output import PARTIAL_SUFFIX

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 500}
"""A lost node is noticed in seconds."""


class Nodes:
    """A cluster of two nodes with one processor each; the driver is on the first, ``second`` may be lost."""

    def __init__(self) -> None:
        os.environ.update(ENVIRONMENT)
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK},
        )
        self.second = self._cluster.add_node(num_cpus=1)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def workers(self) -> list[int]:
        """The processes of the second node that run tasks."""
        return children(self.second.all_processes["raylet"][0].process.pid)

    def all_workers(self) -> list[int]:
        """Those of both nodes: one that was just begun may come too late for a short run."""
        return children(self._cluster.head_node.all_processes["raylet"][0].process.pid) + self.workers()

    def lose_second(self) -> None:
        """SIGKILL for the node's raylet and everything below it."""
        raylet = self.second.all_processes["raylet"][0].process
        for pid in (*self.workers(), raylet.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raylet.wait()

    def replace_second(self) -> None:
        self._cluster.remove_node(self.second, allow_graceful=False)
        self.second = self._cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self._cluster.shutdown()


def children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def writes(pid: int) -> bool:
    """Whether a process has a partial file open."""
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(link.readlink()).endswith(PARTIAL_SUFFIX):
                    return True
    return False


def freeze_one(find: Callable[[], list[int]], driver: subprocess.Popen[str]) -> int:
    """Stop one of the processes in the middle of a file."""
    while driver.poll() is None:
        time.sleep(0.001)  # they need the processor
        for pid in find():
            if writes(pid):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.01)
                if writes(pid):
                    return pid
                os.kill(pid, signal.SIGCONT)
    raise AssertionError(f"nobody wrote anything: {driver.communicate()}")


@contextmanager
def driver(nodes: Nodes, *arguments: object, part: int) -> Iterator[subprocess.Popen[str]]:
    """``omni-convert --engine ray`` in a process, with parts of at least ``part`` bytes."""
    code = (
        f"from omni_convert import cli; from omni_convert.converter import parts; parts.SMALLEST_PART = {part}; "
        "cli.main(prog_name='omni-convert')"
    )
    command: list[Any] = [sys.executable, "-c", code, "--engine", "ray", *map(str, arguments)]
    environment = {**os.environ, "RAY_ADDRESS": nodes.address}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()
