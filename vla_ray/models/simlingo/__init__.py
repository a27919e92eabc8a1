"""SimLingo: InternViT tiles -> pixel shuffle -> projector -> Qwen2 -> trajectory heads (InternVL2-1B layout).

`load_model` and `load_processor` are all that a pipeline needs.
"""

from vla_ray.models.simlingo.checkpoint import load_model
from vla_ray.models.simlingo.config import SimLingoConfig
from vla_ray.models.simlingo.model import SimLingo
from vla_ray.models.simlingo.processing import Processor, load_processor

__all__ = ["Processor", "SimLingo", "SimLingoConfig", "load_model", "load_processor"]
