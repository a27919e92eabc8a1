"""From what is left of a run over samples to summaries, by a plan of policy replicas on Ray."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from vla_ray.config import WorkConfig
from vla_ray.config.infer import TrainedModelConfig
from vla_ray.models.paligemma.cost import count_parameters, inference_bytes
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tokenizer_file import NAME, load_tokenizer
from vla_ray.models.paligemma.trained import configuration
from vla_ray.pipelines.driver import Todo
from vla_ray.pipelines.model_work import Size, run_replicas
from vla_ray.pipelines.resources import Plan
from vla_ray.stages.decode_samples import SampleDecoder
from vla_ray.stages.fitting import DTYPES
from vla_ray.stages.policy import PolicySpec
from vla_ray.stages.work import Replica, Summary
from vla_ray.storage.files import Location


class PolicyWork:
    """A checked policy and where it runs.

    Constructing it checks the checkpoint's small files; weights are read by the replicas.

    Raises:
        CheckpointError: they do not fit each other.
    """

    def __init__(self, config: WorkConfig, model: TrainedModelConfig, directory: Path) -> None:
        self.config, self.settings, self.directory = config, model, directory
        self.processor = Processor.from_directory(directory, model.max_text_length)
        place = Location.of(model.tokenizers or directory / NAME)
        self.tokenizer = load_tokenizer(place, first_action_id=self.processor.ids.first_action)
        self.architecture = configuration(directory, model.base)
        self.parameters = count_parameters(self.architecture).total

    def run(
        self,
        todo: Todo,
        name: str,
        keep: Location | None,
        max_batch: int,
        make_replica: Callable[[PolicySpec], Callable[[], Replica]],
        memory: float = 1.0,
    ) -> Generator[Summary, None, None]:
        """Process what is left.

        Args:
            name: what dashboards and logs call the actors.
            keep: the run whose images/ gets the pictures.
            make_replica: the policy's spec -> picklable function that each actor calls once.
            memory: how many times the working memory of plain decoding a sample takes.
        """
        settings = self.settings

        def make(device: str, dtype: str, plan: Plan) -> Callable[[], Replica]:
            spec = PolicySpec(
                directory=str(self.directory),
                device=device,
                dtype=dtype,
                base=settings.base,
                tokenizers=settings.tokenizers,
                max_text_length=settings.max_text_length,
                threads=plan.threads,
                gpu_share=min(1.0, self.config.gpus_per_replica),
            )
            return make_replica(spec)

        length = self.processor.image_tokens + settings.max_text_length + self.tokenizer.num_tokens
        size = Size(
            self.parameters,
            lambda dtype: memory * inference_bytes(self.architecture, length, DTYPES[dtype].itemsize),
            max_batch,
        )
        decoder = SampleDecoder(self.processor.image_size, keep)
        yield from run_replicas(todo, self.config, settings.device, settings.dtype, size, decoder, make, name)
