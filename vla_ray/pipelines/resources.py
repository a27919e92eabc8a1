"""How many replicas, how large a batch, and whether the cluster can hold them: decided before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from vla_ray.cluster import Cluster
from vla_ray.errors import ClusterError

DECODE_CPUS = 0.25  # of one decode task; differs from a replica's share, so Ray does not fuse the two
REPLICA_SHARE = 0.75  # of the CPUs may be held by replicas; the rest decodes
PROCESS_BYTES = 0.8e9  # a worker with torch and transformers imported, before any model
MEMORY_SHARE = 0.8  # of the free memory may be planned for
MAX_BATCH = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas with their Ray resources, and frames per batch."""

    replicas: int
    batch_size: int
    num_cpus: float
    num_gpus: float
    threads: int | None

    def __str__(self) -> str:
        where = (
            f"{self.num_gpus:g} GPU" if self.num_gpus else f"{self.threads} CPU thread{'s'[: (self.threads or 0) != 1]}"
        )
        return f"{self.replicas} replica{'s'[: self.replicas != 1]} with {where} each, batches of {self.batch_size}"


def make_plan(
    cluster: Cluster,
    device: str,
    replicas: int | None,
    batch_size: int | None,
    model_bytes: float,
    frame_bytes: float,
) -> Plan:
    """Fill in what the user left open and refuse what does not fit.

    Args:
        device: 'cpu' or 'cuda'.
        replicas, batch_size: as asked for, None for automatic.
        model_bytes: weights of one replica.
        frame_bytes: working memory of one frame in a batch.

    Raises:
        ClusterError: more GPUs, CPUs or memory asked for than the cluster has.
    """
    if device == "cuda":
        count = replicas or max(1, int(cluster.num_gpus))
        if count > cluster.num_gpus:
            raise ClusterError(
                f"replicas={count} on model.device=cuda need {count} GPUs, the cluster has {cluster.num_gpus:g}. "
                f"Lower replicas, or use model.device=cpu."
            )
        # Unknown GPU memory: start at the usual size, a batch that does not fit is halved.
        return Plan(count, batch_size or MAX_BATCH, 1.0, 1.0, None)
    cpus = cluster.num_cpus
    if cpus < 1:
        raise ClusterError(f"the cluster has {cpus:g} CPUs; at least 1 is needed.")
    budget = cluster.memory_bytes * MEMORY_SHARE if cluster.memory_bytes else float("inf")

    def needed(replicas: int, batch: int) -> float:
        return replicas * (PROCESS_BYTES + model_bytes + batch * frame_bytes)

    # Two threads a replica: small operations gain little from more.
    count = replicas or max(1, int(cpus // 2))
    while not replicas and count > 1 and needed(count, batch_size or 1) > budget:
        count -= 1
    if count > cpus:
        raise ClusterError(f"replicas={count} need {count} CPUs, the cluster has {cpus:g}. Lower replicas.")
    batch = batch_size or MAX_BATCH
    while not batch_size and batch > 1 and needed(count, batch) > budget:
        batch //= 2
    if needed(count, batch) > budget:
        raise ClusterError(
            f"{count} replica(s) with batches of {batch} need about {needed(count, batch) / 1e9:.1f} GB of memory, "
            f"{budget / 1e9:.1f} GB can be used. Lower replicas or batch_size, or use model.dtype=bfloat16."
        )
    return Plan(count, batch, round(cpus * REPLICA_SHARE / count, 3), 0.0, max(1, int(cpus // count)))
