"""A policy replica that makes maps: what of the picture the actions that it chooses come from, one row per target.

Rows and tables are those of any explained run (schema METRICS and MAPS): `text` is the instruction, `text_ids` are the
chosen action tokens, shares of `queries` are those on action tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vla_ray.attention import IMPLEMENTATION
from vla_ray.errors import TargetError, nearest
from vla_ray.explain.chain import STRENGTH
from vla_ray.explain.heatmap import assemble
from vla_ray.explain.methods import METHODS, Method, folds_of, parse_methods
from vla_ray.schema import GIVEN, PREDICTIONS
from vla_ray.stages.explain import with_maps
from vla_ray.stages.fitting import Fitting
from vla_ray.stages.maps import MadeMap, fold_maps, written
from vla_ray.stages.policy import PolicySpec, load_replica_policy
from vla_ray.stages.policy_visit import PolicyVisit
from vla_ray.stages.replica import failed
from vla_ray.stages.visit import Explained
from vla_ray.stages.work import Loaded, Row
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.ledger import read_metrics
from vla_ray.targets import Target

GRADIENT = "gradient_x_input"
POLICY_METHODS = tuple(m.name for m in METHODS.values() if m.kind == "fold" or m.name == GRADIENT)


@dataclass(frozen=True, slots=True)
class PolicyExplainSpec:
    """What to explain, and by which methods.

    Attributes:
        run_dir: of the maps.
        methods: of POLICY_METHODS.
        strength: how much one hop moves, see explain/chain.py.
        predictions: the run whose actions are explained; None: what the policy decodes now. Where that run took means
            over bins (decode=expected) the likeliest bins are explained.
    """

    run_dir: Location
    targets: tuple[Target, ...]
    methods: tuple[Method, ...]
    strength: float = STRENGTH
    predictions: Location | None = None


def policy_methods(names: str | Sequence[str]) -> tuple[Method, ...]:
    """Methods by name, of those that explain a policy. TargetError for any other."""
    methods = parse_methods(names)
    for method in methods:
        if method.name not in POLICY_METHODS:
            raise TargetError(
                f"the method {method.name!r} does not explain a policy; these do: {', '.join(POLICY_METHODS)}."
                f"{nearest(method.name, POLICY_METHODS)}"
            )
    return methods


class PolicyExplainer(Fitting):
    """See stages/work.py for the protocol it serves."""

    def __init__(self, spec: PolicyExplainSpec, policy: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.targets = {target.name: target for target in spec.targets}
        self.policy, self.processor, self.tokenizer = load_replica_policy(policy)
        self.policy.model.set_attn_implementation(IMPLEMENTATION)  # plain SDPA while nothing watches
        self.actions = {} if spec.predictions is None else _actions(spec.predictions)

    def attempt(self, frames: Sequence[Loaded], targets: Sequence[str]) -> list[Row]:
        """Rows of one batch of decoded samples and all targets, their maps written."""
        visit = PolicyVisit(
            self.policy,
            self.processor,
            self.tokenizer,
            [frame.tiles[0] for frame in frames if frame.tiles is not None],
            [frame.columns["instruction"] for frame in frames],
            folds_of(self.spec.methods),
            self.spec.strength,
            self._bins(frames),
            pixels=any(method.name == GRADIENT for method in self.spec.methods),
        )
        rows, maps = [], []
        for i, name in enumerate(targets):
            explained = visit.explain(self.targets[name], keep_graph=i + 1 < len(targets))
            for b, frame in enumerate(frames):
                row = {**about(frame, self.targets[name]), **self._columns(visit, explained, b)}
                row, found = with_maps(row, explained, b, partial(self._maps, visit, explained, b, frame))
                rows.append(row)
                maps += found
        return written(self.spec.run_dir, rows, maps)

    def _bins(self, frames: Sequence[Loaded]) -> torch.Tensor | None:
        """The predicted actions as bins [B, 2H]; None if one of them is unknown."""
        found = [self.actions.get(frame.sample.frame_id) for frame in frames]
        if any(actions is None for actions in found):
            return None
        steps = np.reshape(np.array(found, np.float64), (len(frames), -1, 2))
        return torch.from_numpy(self.tokenizer.encode(steps))

    def failed(self, frame: Loaded, target: str, error_type: str, error: str) -> Row:
        """The row of a sample that cannot be explained."""
        return failed(about(frame, self.targets[target]), error_type, error)

    def _columns(self, visit: PolicyVisit, explained: Explained, b: int) -> Row:
        count, bins = len(visit.prompts), visit.bins[b].cpu()
        return {
            "target_scalar": float(explained.scalar_B[b]),
            "token_index": explained.tokens[b],
            "text_ids": (bins + self.policy.first_action_id).tolist(),
            "num_tiles": 1,
            "num_prompt_tokens": len(visit.prompts[b]),
            "num_generated_tokens": len(bins),
            "generate_s": visit.generate_s / count,
            "forward_s": visit.forward_s / count,
            "backward_s": explained.seconds / count,
        }

    def _maps(self, visit: PolicyVisit, explained: Explained, b: int, frame: Loaded) -> list[Row]:
        geometry, target = frame.geometry, explained.target
        assert geometry is not None
        relevance, seed = visit.relevance(explained, b).cpu(), visit.seed_row(explained, b)
        value = float(explained.scalar_B[b])
        maps = fold_maps(self.spec.methods, relevance, target, value, geometry, visit.spans(b), seed)
        for method in self.spec.methods:
            if method.name == GRADIENT:
                heat = assemble(visit.gradient_x_input(explained, b).cpu().numpy(), geometry)
                maps.append(MadeMap(method, "none", heat))
        return [m.row(frame.sample.frame_id, frame.sample.scene, target.name) for m in maps]


def _actions(run: Location) -> dict[str, list[float]]:
    """Sample -> what an inference run predicted: centres of the bins that it chose. Empty where it took means."""
    if (read_json(run / "run.json") or {}).get("settings", {}).get("decode") != "greedy":
        return {}
    table = read_metrics(run, ["frame_id", "target", "predicted"], PREDICTIONS)
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return {sample: actions for sample, variant, actions in rows if variant == GIVEN and actions}


def about(frame: Loaded, target: Target) -> Row:
    """The columns that every row has, failed ones included."""
    sample = frame.sample
    return {
        "frame_id": sample.frame_id,
        "target": target.name,
        "scene": sample.scene,
        "tag": Path(sample.image_filename).stem,
        "image_path": frame.columns.get("image_path"),
        "frame": json.dumps(sample.to_dict()),
        "geometry": json.dumps(frame.geometry.to_dict()) if frame.geometry else None,
        "mode": target.mode,
        "text": frame.columns.get("instruction"),
        "decode_s": frame.decode_s,
    }
