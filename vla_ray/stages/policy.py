"""A policy in a replica: where its files are, what it runs on, and how it is loaded. Plain values travel to actors."""

from __future__ import annotations

from dataclasses import dataclass

from vla_ray.models.paligemma import lora
from vla_ray.models.paligemma.actions import ActionTokenizer
from vla_ray.models.paligemma.policy import ActionPolicy
from vla_ray.models.paligemma.processing import Processor
from vla_ray.models.paligemma.tokenizer_file import NAME, load_decoding, load_tokenizer
from vla_ray.stages.fitting import DTYPES, set_up_process
from vla_ray.storage.files import Location


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """All that loading a policy needs.

    Attributes:
        directory: a checkpoint of jobs/train.py, merged, full or adapters; it has a tokenizers.pt.
        base: where the base of adapters is, if not where it was when they were learnt.
        tokenizers: the tokenizers.pt, if the directory has none.
        max_text_length: tokens of an instruction; more are cut off.
        threads: of this process; None leaves torch's choice.
        gpu_share: the part of the GPU's memory that this replica may use.
    """

    directory: str
    device: str = "cpu"
    dtype: str = "float32"
    base: str | None = None
    tokenizers: str | None = None
    max_text_length: int = 128
    threads: int | None = None
    gpu_share: float = 1.0


def load_replica_policy(spec: PolicySpec, attention: str = "sdpa") -> tuple[ActionPolicy, Processor, ActionTokenizer]:
    """The policy on its device in eval mode, adapters folded in, with its processor and action tokens.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the others.
    """
    set_up_process(spec.device, spec.threads, spec.gpu_share)
    processor = Processor.from_directory(spec.directory, spec.max_text_length)
    place = Location.of(spec.tokenizers or f"{spec.directory}/{NAME}")
    tokenizer = load_tokenizer(place, first_action_id=processor.ids.first_action)
    policy = ActionPolicy.from_pretrained(
        spec.directory,
        tokenizer,
        dtype=DTYPES[spec.dtype],
        attention=attention,
        base=spec.base,
        decoding=load_decoding(place),
    )
    policy.model = lora.merged(policy.model)
    return policy.to(spec.device).eval().requires_grad_(False), processor, tokenizer
