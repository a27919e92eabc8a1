"""Settings of jobs/explain.py for a policy: which predictions are explained, and what of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_ray.config.infer import TrainedModelConfig
from vla_ray.config.knobs import at_least, knob
from vla_ray.config.shared import WorkConfig
from vla_ray.errors import ConfigError


@dataclass(frozen=True)
class PolicyExplainConfig(WorkConfig):
    """Maps of which pixels a policy's actions came from, for the samples of an inference run.

    Targets: lateral_offset, forward_progress (expected end point, units), side (log-odds of the first step), x_<k>,
    y_<k> (expected delta of step k), token_<k> (log-probability of the chosen bin of action token k: x0 y0 x1 ...).
    Methods: relevancy, relevancy_positive, relevancy_negative, relevancy_signed, relevancy_lm, relevancy_vit,
    attention_x_gradient[_lm], rollout[_lm|_vit], raw_attention[_lm|_vit], raw_attention_last_lm, gradient_x_input.
    """

    run: str | None = knob(None, "a run of jobs/infer.py; null: the newest one, or one of the bundled corridors")
    maps: str = knob("maps", "name of the maps in the run; other methods or targets need another one")
    targets: Any = knob(("token_1", "lateral_offset", "forward_progress"), "one or a list of the targets above")
    methods: Any = knob(("relevancy", "relevancy_signed"), "one or a list of the methods above")
    strength: float = knob(0.2, "of relevancy: how much one hop moves")
    match: str | None = knob(None, "explain samples whose instruction contains this text")
    samples: int | None = knob(200, "explain about N of these: all of pictures spread evenly over the run; null: all")
    report: bool = knob(True, "write report/index.html again, with the maps")
    model: TrainedModelConfig = knob(TrainedModelConfig, "where the run's policy computes: model.device")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("samples", self.samples, 1)
        if self.strength <= 0:
            raise ConfigError(f"strength={self.strength:g} must be positive; 0.2 is the default.")
