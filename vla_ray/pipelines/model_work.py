"""From what is left of a run to summaries, by a plan of replicas on Ray; shared by every workload.

Importing this loads transformers and Ray (seconds), so jobs do it only when there is work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass

from vla_ray.cluster import connect
from vla_ray.config import ClusterConfig, ModelConfig, RunConfig, WorkConfig
from vla_ray.models.simlingo.checkpoint import read_state, verify
from vla_ray.models.simlingo.config import read_config
from vla_ray.models.simlingo.processing import load_processor, make_tiler
from vla_ray.pipelines.driver import Todo
from vla_ray.pipelines.engine import run_items
from vla_ray.pipelines.resources import MAX_BATCH, Plan, make_plan
from vla_ray.stages.decode import Decoder
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.replica import ModelSpec
from vla_ray.stages.work import Replica, Summary

logger = logging.getLogger(__name__)


class ModelWork:
    """A checked model and where it runs.

    Constructing it checks the checkpoint against its configuration, from the file's header alone.

    Raises:
        CheckpointError: they do not fit each other.
    """

    def __init__(self, config: RunConfig, model: ModelConfig | None = None) -> None:
        self.config, self.settings = config, model or config.model
        shapes = {name: tuple(tensor.shape) for name, tensor in read_state(self.settings.checkpoint).items()}
        self.model = read_config(str(self.settings.config), self.settings.variant_dir, shapes)
        self.parameters = verify(self.model, shapes, self.settings.checkpoint)
        load_processor(self.model)  # a tokenizer that does not fit should not wait for Ray to say so

    def run(
        self,
        todo: Todo,
        name: str,
        frame_bytes: Callable[[str], float],
        make_replica: Callable[[ModelSpec], Callable[[], Replica]],
    ) -> Generator[Summary, None, None]:
        """Process what is left.

        Args:
            name: what dashboards and logs call the actors.
            frame_bytes: dtype -> working memory of one frame in a batch.
            make_replica: the model's spec -> picklable function that each actor calls once.
        """

        def make(device: str, dtype: str, plan: Plan) -> Callable[[], Replica]:
            spec = ModelSpec(
                model=self.model,
                checkpoint=self.settings.checkpoint,
                device=device,
                dtype=dtype,
                max_new_tokens=self.settings.max_new_tokens,
                threads=plan.threads,
                gpu_share=min(1.0, self.config.gpus_per_replica),
            )
            return make_replica(spec)

        decoder, settings = Decoder(make_tiler(self.model)), self.settings
        size = Size(self.parameters, frame_bytes)
        yield from run_replicas(todo, self.config, settings.device, settings.dtype, size, decoder, make, name)

    def dtype(self, device: str) -> str:
        """What weights and activations are kept in."""
        return dtype_on(device, self.settings.dtype)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is: its parameters; dtype -> working memory of one frame in a batch; the largest batch."""

    parameters: int
    frame_bytes: Callable[[str], float]
    max_batch: int = MAX_BATCH


def run_replicas(
    todo: Todo,
    config: WorkConfig,
    device: str,
    dtype: str,
    size: Size,
    decoder: Decoder,
    make_replica: Callable[[str, str, Plan], Callable[[], Replica]],
    name: str,
) -> Generator[Summary, None, None]:
    """Process what is left on as many replicas as fit.

    Args:
        device, dtype: as asked for; `auto` is decided here, and the dtype pinned for all resumes.
        make_replica: device, dtype and plan -> picklable function that each actor calls once.
        name: what dashboards and logs call the actors.
    """
    with connect(config.cluster) as cluster:
        if device == "auto":
            device = "cuda" if cluster.num_gpus >= 1 else "cpu"
        dtype = dtype_on(device, dtype)
        todo.pin("model.dtype", dtype)
        plan = make_plan(
            cluster,
            device,
            config.replicas,
            config.batch_size,
            model_bytes=size.parameters * DTYPES[dtype].itemsize,
            frame_bytes=size.frame_bytes(dtype),
            gpus_per_replica=config.gpus_per_replica,
            max_batch=size.max_batch,
        )
        logger.info("%s (%s)", plan, dtype)
        yield from run_items(
            todo.items(plan.batch_size),
            decoder,
            make_replica(device, dtype, plan),
            todo.location,
            todo.token,
            plan,
            name,
            todo.schema,
        )


def dtype_on(device: str, asked: str) -> str:
    """What weights and activations are kept in."""
    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" else "float32"


def run_without_model(
    todo: Todo, cluster: ClusterConfig, config: RunConfig, name: str, make_replica: Callable[[], Replica]
) -> Generator[Summary, None, None]:
    """Process items that need no model and no picture: replicas read what an earlier stage stored."""
    with connect(cluster) as found:
        plan = make_plan(found, "cpu", config.replicas, config.batch_size, model_bytes=0.0, frame_bytes=0.5e9)
        yield from run_items(todo.items(plan.batch_size), None, make_replica, todo.location, todo.token, plan, name)
