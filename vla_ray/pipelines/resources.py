"""How many replicas, how large a batch, and whether the cluster can hold them: decided before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_ray.cluster import Cluster
from vla_ray.errors import ClusterError

DECODE_CPUS = 0.25  # of one decode task; differs from a replica's share, so Ray does not fuse the two
REPLICA_SHARE = 0.75  # of the CPUs may be held by replicas; the rest decodes
REPLICA_BYTES = 0.8e9  # a worker with torch and transformers imported, before any model
DECODE_BYTES = 0.25e9  # a worker that reads and tiles pictures
DECODERS_PER_REPLICA = 2
MEMORY_SHARE = 0.8  # of the free memory may be planned for
MAX_BATCH = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas with their Ray resources, frames per batch, and decode tasks that may run at once."""

    replicas: int
    batch_size: int
    num_cpus: float
    num_gpus: float
    threads: int | None
    decoders: int

    def __str__(self) -> str:
        if self.num_gpus:
            where = f"{self.num_gpus:g} GPU"
        else:
            where = f"{self.threads} CPU {'thread' if self.threads == 1 else 'threads'}"
        count = "1 replica" if self.replicas == 1 else f"{self.replicas} replicas"
        return f"{count} with {where} each, batches of {self.batch_size}"


def make_plan(
    cluster: Cluster,
    device: str,
    replicas: int | None,
    batch_size: int | None,
    model_bytes: float,
    frame_bytes: float,
    gpus_per_replica: float = 1.0,
    max_batch: int = MAX_BATCH,
) -> Plan:
    """Fill in what the user left open and refuse what does not fit.

    Args:
        device: 'cpu' or 'cuda'.
        replicas, batch_size: as asked for, None for automatic.
        model_bytes: weights of one replica.
        frame_bytes: working memory of one frame in a batch.
        max_batch: how large an automatic batch may be.

    Raises:
        ClusterError: more GPUs, CPUs or memory asked for than the cluster has.
    """
    if cluster.num_cpus < 1:
        raise ClusterError(f"the cluster has {cluster.num_cpus:g} CPUs; at least 1 is needed.")
    budget = cluster.memory_bytes * MEMORY_SHARE if cluster.memory_bytes else math.inf
    if device == "cuda":
        return _gpu_plan(cluster, replicas, batch_size, model_bytes, gpus_per_replica, budget, max_batch)
    return _cpu_plan(cluster, replicas, batch_size, model_bytes, frame_bytes, budget, max_batch)


def _gpu_plan(
    cluster: Cluster,
    replicas: int | None,
    batch_size: int | None,
    model_bytes: float,
    gpus: float,
    budget: float,
    max_batch: int,
) -> Plan:
    # A share above one half leaves no room for a second replica on the same GPU.
    possible = int(cluster.num_gpus * int(1 / gpus)) if gpus <= 1 else int(cluster.num_gpus / gpus)
    if cluster.num_gpus < 1:
        raise ClusterError("model.device=cuda needs a GPU, the cluster has none. Use model.device=cpu.")
    count = max(replicas or possible, 1)
    if count > possible:
        raise ClusterError(
            f"replicas={count} with gpus_per_replica={gpus:g} need {count * gpus:g} GPUs, the cluster has "
            f"{cluster.num_gpus:g}. Lower replicas or gpus_per_replica, or use model.device=cpu."
        )
    needed = count * (REPLICA_BYTES + model_bytes + DECODERS_PER_REPLICA * DECODE_BYTES)  # weights pass through RAM
    if needed > budget:
        raise _too_little_memory(count, batch_size or max_batch, needed, budget)
    # A batch that does not fit the GPU's memory is halved while running.
    share = min(1.0, REPLICA_SHARE * cluster.num_cpus / count)
    return Plan(count, batch_size or max_batch, round(share, 3), gpus, None, DECODERS_PER_REPLICA * count)


def _cpu_plan(
    cluster: Cluster,
    replicas: int | None,
    batch_size: int | None,
    model_bytes: float,
    frame_bytes: float,
    budget: float,
    max_batch: int,
) -> Plan:
    def needed(replicas: int, batch: int) -> float:
        return replicas * (REPLICA_BYTES + model_bytes + batch * frame_bytes + DECODERS_PER_REPLICA * DECODE_BYTES)

    cpus = cluster.num_cpus
    # Two threads a replica: small operations gain little from more.
    count = replicas or max(1, int(cpus // 2))
    while not replicas and count > 1 and needed(count, batch_size or 1) > budget:
        count -= 1
    if count > cpus:
        raise ClusterError(f"replicas={count} need {count} CPUs, the cluster has {cpus:g}. Lower replicas.")
    batch = batch_size or max_batch
    while not batch_size and batch > 1 and needed(count, batch) > budget:
        batch //= 2
    if needed(count, batch) > budget:
        raise _too_little_memory(count, batch, needed(count, batch), budget)
    # A replica lives on one node, so its share cannot exceed a node's.
    share = min(cpus / count, cluster.largest_node_cpus)
    return Plan(
        count,
        batch,
        round(REPLICA_SHARE * share, 3),
        0.0,
        max(1, int(share)),
        min(int(cpus), DECODERS_PER_REPLICA * count),
    )


def _too_little_memory(replicas: int, batch: int, needed: float, budget: float) -> ClusterError:
    return ClusterError(
        f"replicas={replicas} with batch_size={batch} need about {needed / 1e9:.1f} GB of memory, "
        f"{budget / 1e9:.1f} GB can be used. Lower replicas or batch_size, or use model.dtype=bfloat16."
    )
