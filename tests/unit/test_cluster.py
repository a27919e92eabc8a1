"""Connecting to Ray, as far as it goes without Ray: signals, and addresses where nobody listens."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from vla_ray import cluster
from vla_ray.config import ClusterConfig
from vla_ray.errors import ClusterError


class Stopped(BaseException):
    """What the caller's own handler raises."""


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM raises Stopped; Ray is as it would be without any cluster."""

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    old = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, old)


def init(then: Any) -> Any:
    """A ray.init that takes SIGTERM for itself, as Ray's does."""

    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        then()

    return start


def test_rays_own_sigterm_handler_does_not_stay(caught: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", init(lambda: None))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with cluster.connect(ClusterConfig()) as found:
        assert (found.num_cpus, found.num_gpus, found.largest_node_cpus) == (4, 0, 3)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_a_sigterm_while_ray_starts_reaches_the_caller(caught: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", init(lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Stopped), cluster.connect(ClusterConfig()):
        pytest.fail("there is nothing to work on")


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_where_nobody_listens_is_refused_at_once(
    caught: None, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(ray, "init", init(lambda: pytest.fail("Ray would try for minutes")))
    with socket.socket() as reserved:  # bound, but it does not listen
        reserved.bind(("127.0.0.1", 0))
        address = form.format(reserved.getsockname()[1])
        with pytest.raises(ClusterError, match="nobody answers there") as refused:
            cluster.connect(ClusterConfig(address=address)).__enter__()
    assert repr(address) in str(refused.value)
    assert "ray start --head" in str(refused.value)


def test_what_ray_says_about_a_refusal_is_one_line(caught: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConnectionError("Could not find any\nrunning Ray instance.")

    monkeypatch.setattr(ray, "init", init(refuse))
    with pytest.raises(ClusterError, match=r"ConnectionError: Could not find any running Ray instance\.") as refused:
        cluster.connect(ClusterConfig(address="auto")).__enter__()
    assert "\n" not in str(refused.value)
