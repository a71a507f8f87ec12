"""A Ray cluster to hand tasks to: connect, look at every node, run calls until all are done or one fails."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import OmniConvertError, UsageError, printable

RETRIES = 3
"""Losing a worker is rare. What is lost four times in a row is what kills them, for want of memory for example."""
_QUEUED_PER_WORKER = 2
"""A worker that is done finds its next task there, and a hash, which goes before others, waits for one at most."""
_OBJECT_STORE_BYTES = 128 << 20
"""Of a cluster of our own: the plan goes through it, weights do not."""
_SECONDS_BETWEEN_LOOKS = 1
_SECONDS_TO_CANCEL = 30
_SECONDS_TO_LOOK = 60
"""Without any result, whether a node is left that could end one: time for a lost one to be replaced."""
_SECONDS_TO_ANSWER = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """``function(*arguments)`` on some node; ``then`` receives its result here. ``name``: for errors and Ray's logs."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    then: Callable[[Any], None]


def import_ray() -> Any:
    """Raises:
    UsageError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--engine ray: Ray is not installed here. Install it on every node: pip install 'omni-convert[ray]'"
        ) from error
    return ray


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray, connected to the cluster that RAY_ADDRESS names or that runs on this machine, or else to one of our own.

    Raises:
        OmniConvertError: there is no cluster at RAY_ADDRESS, or it has other versions of Ray or Python.
    """
    ray = import_ray()
    if ray.is_initialized():  # by whoever calls us from Python
        yield ray
        return
    with redirect_stdout(sys.stderr):  # Ray prints there what it has to say of workers; ours is for the result
        try:
            with _own_signals():
                _connect(ray)
            yield ray
        finally:
            with _own_signals():
                ray.shutdown()


def _connect(ray: Any) -> None:
    quiet = {"logging_level": logging.WARNING}
    _check_answers()
    try:
        ray.init(address="auto", **quiet)
    except (ConnectionError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS")
        if address or not isinstance(error, ConnectionError):
            raise OmniConvertError(
                f"The Ray cluster {printable(address or 'on this machine')} cannot be used "
                f"({printable(str(error), 400)}). Start it (ray start), with the same versions of Ray and Python on "
                "every node, then run again."
            ) from error
        _log.warning(
            "No Ray cluster runs on this machine, and RAY_ADDRESS names none: the processors of this machine do it all."
        )
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)


def _check_answers() -> None:
    """Ray itself would wait for a cluster that is gone, without end.

    Raises:
        OmniConvertError: nobody answers at the address that Ray would take.
    """
    latest = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address, origin = os.environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
    if address in ("", "auto") and latest.is_file():
        address, origin = latest.read_text().strip(), str(latest)
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise OmniConvertError(
            f"The Ray cluster {printable(address)} ({origin}) does not answer ({error}), expected one that runs. Start "
            "it (ray start --head), or forget it (ray stop, and unset RAY_ADDRESS), then run again."
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray has SIGTERM end the process at once, but a run that stops tidies up first."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def workers(ray: Any, threads: int) -> int:
    """How many tasks of so many threads the cluster runs at once.

    Raises:
        UsageError: no node can run any.
    """
    processors = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if (count := sum(number // threads for number in processors)) == 0:
        raise UsageError(
            f"--threads {threads}: the largest node of the Ray cluster has {max(processors, default=0)} processors. "
            "Ask for fewer, or add nodes (ray start --address)."
        )
    return count


def check_nodes(ray: Any, check: Callable[..., None], *arguments: Any) -> None:
    """Run ``check(*arguments)`` once on every node that has processors.

    Raises:
        OmniConvertError: of the check, or a node cannot import it.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    checks = []
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(check).options(scheduling_strategy=here, name="check")
        checks.append(task.remote(*arguments))
    for node, ref in zip(nodes, checks, strict=True):
        try:
            ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OmniConvertError):
                raise error.cause from None
            raise OmniConvertError(
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): cannot run omni-convert "
                f"({printable(str(error.cause), 400)}). Install the same version on every node, then run again."
            ) from error
        except ray.exceptions.RayError as error:  # it was lost since it was listed; others will do its work
            _log.warning("node %s was lost: %s", node["NodeManagerAddress"], printable(str(error)))


def run_calls(ray: Any, calls: deque[Call], threads: int) -> None:
    """Run all ``calls``, in this order as workers become free; ``then`` may add to them. Nodes may come and go.

    Raises:
        OmniConvertError, OSError: the first that a call raises; the others are stopped.
    """
    running: dict[Any, Call] = {}
    remote: dict[Callable[..., Any], Any] = {}  # a function is sent to the cluster once
    places, looked = 0, 0.0
    try:
        while calls or running:
            if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                places, looked = _QUEUED_PER_WORKER * workers(ray, threads), time.monotonic()
            while calls and len(running) < places:
                call = calls.popleft()
                if call.function not in remote:
                    options = {"num_cpus": threads, "max_retries": RETRIES, "retry_exceptions": False}
                    remote[call.function] = ray.remote(**options)(call.function)
                ref = remote[call.function].options(name=call.name).remote(*call.arguments)
                running[ref] = call
            done, _ = ray.wait(list(running), num_returns=1, timeout=_SECONDS_TO_LOOK)
            for ref in done:
                call = running.pop(ref)
                call.then(_result(ray, ref, call))
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_SECONDS_TO_CANCEL)


def _result(ray: Any, ref: Any, call: Call) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OmniConvertError | OSError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise OmniConvertError(
            f"{printable(call.name)}: {RETRIES + 1} workers in a row were lost with it, expected one to end it "
            f"({type(error).__name__}: {printable(str(error), 300)}). Look at the cluster (ray status, ray list nodes) "
            "and its memory, then run again."
        ) from error
