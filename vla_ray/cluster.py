"""Connecting to Ray, with defaults for long batch jobs; the cluster's resources in plain numbers."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from vla_ray.before_ray import TOKEN  # isort: skip  # it must come before ray
import ray
from ray.data import DataContext

from vla_ray.config import ClusterConfig
from vla_ray.errors import ClusterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What can be asked for.

    Attributes:
        memory_bytes: free host memory of this node for a local Ray, Ray's own figure else.
        largest_node_cpus: no single worker can have more.
    """

    local: bool
    num_cpus: float
    num_gpus: float
    memory_bytes: float
    largest_node_cpus: float


_kept: ExitStack | None = None


@contextmanager
def kept_connection() -> Iterator[None]:
    """Inside, what the first `connect` opens stays open for the next ones: starting Ray takes seconds."""
    global _kept
    with ExitStack() as _kept:
        try:
            yield
        finally:
            _kept = None


@contextmanager
def connect(settings: ClusterConfig) -> Iterator[Cluster]:
    """Connect to the running cluster, or start Ray inside this process; shut it down at the end.

    Raises:
        ClusterError: no cluster at the address, or it refuses us.
    """
    if _kept is not None and not ray.is_initialized():
        yield _kept.enter_context(_connect(settings))
    else:
        with _connect(settings) as cluster:
            yield cluster


@contextmanager
def _connect(settings: ClusterConfig) -> Iterator[Cluster]:
    _set_data_defaults()
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():  # a notebook or a test that brings its own, or a kept connection
        yield _describe(local=address in (None, "local"))
        return
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if address in (None, "local"):
        _start(
            address="local",
            num_cpus=settings.num_cpus,
            object_store_memory=settings.object_store_mb << 20,
            include_dashboard=settings.dashboard,
            **quiet,
        )
        _keep_token_private()
    else:
        try:
            _knock(address)
            _start(address=address, **quiet)
        except Exception as e:  # ConnectionError, RuntimeError, AuthenticationError ...: all mean "not connected"
            reason = " ".join(str(e).split())[:200]
            raise ClusterError(
                f"cannot connect to a Ray cluster at {address!r} ({type(e).__name__}: {reason}). "
                "Start one with `ray start --head`, or leave cluster.address out to run Ray inside the job; if it asks "
                "for a token, export RAY_AUTH_MODE=token."
            ) from e
    try:
        yield _describe(local=address in (None, "local"))
    finally:
        ray.shutdown()


def _start(**arguments: Any) -> None:
    """ray.init, without the handler that it installs: a SIGTERM would end the job without a word, now and later."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    stopped = False
    try:
        ray.init(**arguments)
    except SystemExit:  # Ray's answer to a SIGTERM that came while it started
        stopped = True
        ray.shutdown()
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    if stopped:
        signal.raise_signal(signal.SIGTERM)


def _knock(address: str) -> None:
    """ConnectionError if nobody listens at host:port; Ray would try for minutes, with pages of warnings."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):  # 'auto'
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ConnectionError(f"nobody answers there: {e}") from e


def _describe(local: bool) -> Cluster:
    resources = ray.cluster_resources()
    memory = float(psutil.virtual_memory().available) if local else float(resources.get("memory", 0.0))
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return Cluster(local, resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory, max(nodes, default=0.0))


def _set_data_defaults() -> None:
    """Read by datasets when they are made."""
    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts frames, not blocks
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    # Loading a model or waiting for a GPU may take longer than any default.
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = 3
    for noisy in ("ray.data", "ray._private.authentication"):  # notes on defaults, as warnings; Ray keeps its own logs
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _keep_token_private() -> None:
    """Ray creates the token readable by everyone."""
    if TOKEN.is_file() and TOKEN.stat().st_uid == os.getuid():
        TOKEN.chmod(0o600)
