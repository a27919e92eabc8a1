"""Every knob of every job: its type, its default, and one line on what it means.

YAML files under configs/ hold values only. A job gets one of these objects, frozen, with relative paths resolved.
Relative paths typed by the user are taken from VLA_RAY_ROOT when it is set, else from the current directory.
"""

from vla_ray.config.evaluate import EvaluateConfig
from vla_ray.config.explain_policy import PolicyExplainConfig
from vla_ray.config.frames import (
    CaptureConfig,
    ExplainConfig,
    FaithfulnessConfig,
    FramesConfig,
    PipelineConfig,
    ReportConfig,
)
from vla_ray.config.infer import InferConfig
from vla_ray.config.knobs import resolve_path
from vla_ray.config.prepare import PrepareConfig
from vla_ray.config.shared import ClusterConfig, ModelConfig, RunConfig, SplineConfig, WandbConfig, WorkConfig
from vla_ray.config.tools import BenchmarkConfig, ScenesConfig, ShowConfig, TinyDriverConfig
from vla_ray.config.train import TrainConfig

__all__ = [
    "BenchmarkConfig",
    "CaptureConfig",
    "ClusterConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "FaithfulnessConfig",
    "FramesConfig",
    "InferConfig",
    "ModelConfig",
    "PipelineConfig",
    "PolicyExplainConfig",
    "PrepareConfig",
    "ReportConfig",
    "RunConfig",
    "ScenesConfig",
    "ShowConfig",
    "SplineConfig",
    "TinyDriverConfig",
    "TrainConfig",
    "WandbConfig",
    "WorkConfig",
    "resolve_path",
]
