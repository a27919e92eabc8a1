"""The plan: what is chosen when nothing is asked for, and what is refused, with the numbers."""

from __future__ import annotations

import pytest

from vla_ray.cluster import Cluster
from vla_ray.errors import ClusterError
from vla_ray.pipelines.resources import DECODE_BYTES, DECODE_CPUS, DECODERS_PER_REPLICA, REPLICA_BYTES, Plan, make_plan

GB = 1e9
PROCESSES = REPLICA_BYTES + DECODERS_PER_REPLICA * DECODE_BYTES  # of one replica, before any model


def cluster(cpus: float, gpus: float = 0, memory: float = 64 * GB, largest: float | None = None) -> Cluster:
    return Cluster(True, cpus, gpus, memory, largest_node_cpus=cpus if largest is None else largest)


def plan(
    given: Cluster,
    device: str = "cpu",
    replicas: int | None = None,
    batch_size: int | None = None,
    model_bytes: float = 0,
    frame_bytes: float = 0,
    gpus_per_replica: float = 1.0,
) -> Plan:
    return make_plan(given, device, replicas, batch_size, model_bytes, frame_bytes, gpus_per_replica)


@pytest.mark.parametrize(
    ("cpus", "replicas", "threads"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (7, 3, 2), (16, 8, 2)]
)
def test_cpus_are_shared_fairly(cpus: int, replicas: int, threads: int) -> None:
    p = plan(cluster(cpus))
    assert (p.replicas, p.threads, p.batch_size, p.num_gpus) == (replicas, threads, 8, 0)
    assert p.replicas * p.num_cpus + DECODE_CPUS <= cpus + 0.01, "decoding needs a share, or nothing moves"
    assert p.num_cpus != DECODE_CPUS, "Ray would fuse decoding into the replicas"


def test_one_replica_per_gpu() -> None:
    p = plan(cluster(32, gpus=4), "cuda", model_bytes=2 * GB)
    assert (p.replicas, p.num_gpus, p.num_cpus, p.threads) == (4, 1, 1, None)
    p = plan(cluster(32, gpus=4), "cuda", replicas=2, batch_size=3)
    assert (p.replicas, p.batch_size) == (2, 3)


def test_replicas_may_share_a_gpu() -> None:
    assert plan(cluster(32, gpus=2), "cuda", gpus_per_replica=0.5).replicas == 4
    assert plan(cluster(32, gpus=2), "cuda", gpus_per_replica=0.4).replicas == 4, "two on each, never one on both"
    assert plan(cluster(32, gpus=4), "cuda", gpus_per_replica=2).replicas == 2


def test_as_many_gpus_as_cpus_leave_cpus_for_decoding() -> None:
    p = plan(cluster(8, gpus=8), "cuda")
    assert p.replicas * p.num_cpus + DECODE_CPUS <= 8


def test_a_replica_fits_on_one_node() -> None:
    """Ten nodes with two CPUs: a replica that asks for five would wait for ever."""
    p = plan(cluster(20, largest=2), replicas=3)
    assert p.num_cpus + DECODE_CPUS <= 2
    assert p.threads == 2


def test_replicas_and_then_the_batch_give_way_to_memory() -> None:
    """0.8 of the free memory is for processes, models and frames."""
    one = PROCESSES + GB
    p = plan(cluster(8, memory=(2 * one + 1 * GB) / 0.8), model_bytes=GB, frame_bytes=0.1 * GB)
    assert (p.replicas, p.batch_size) == (2, 4)
    p = plan(cluster(8, memory=(one + 0.15 * GB) / 0.8), model_bytes=GB, frame_bytes=0.1 * GB)
    assert (p.replicas, p.batch_size) == (1, 1)
    assert plan(cluster(2, memory=0), model_bytes=GB, frame_bytes=GB).batch_size == 8, "unknown: nothing is refused"


@pytest.mark.parametrize(
    ("given", "device", "replicas", "batch_size", "words"),
    [
        (cluster(8, gpus=2), "cuda", 3, None, ["replicas=3", "3 GPUs", "has 2", "model.device=cpu"]),
        (cluster(8), "cuda", None, None, ["needs a GPU", "has none"]),
        (cluster(4), "cpu", 5, None, ["replicas=5", "5 CPUs", "has 4"]),
        (cluster(0), "cpu", None, None, ["0 CPUs", "at least 1"]),
        (cluster(0, gpus=1), "cuda", None, None, ["0 CPUs", "at least 1"]),
        (cluster(8, memory=10 * GB), "cpu", 4, 2, ["replicas=4", "batch_size=2", "17.2 GB", "8.0 GB", "Lower"]),
        (cluster(8, memory=2 * GB), "cpu", None, None, ["replicas=1", "batch_size=1", "3.8 GB", "1.6 GB"]),
        (cluster(8, gpus=4, memory=10 * GB), "cuda", None, None, ["replicas=4", "13.2 GB", "8.0 GB"]),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(
    given: Cluster, device: str, replicas: int | None, batch_size: int | None, words: list[str]
) -> None:
    with pytest.raises(ClusterError) as refused:
        plan(given, device, replicas, batch_size, model_bytes=2 * GB, frame_bytes=0.5 * GB)
    for word in words:
        assert word in str(refused.value)


def test_a_plan_reads_like_a_sentence() -> None:
    assert str(plan(cluster(2), batch_size=1)) == "1 replica with 2 CPU threads each, batches of 1"
    assert str(plan(cluster(2), replicas=2)) == "2 replicas with 1 CPU thread each, batches of 8"
    assert str(plan(cluster(8, gpus=2), "cuda")) == "2 replicas with 1 GPU each, batches of 8"
