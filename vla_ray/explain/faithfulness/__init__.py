"""Whether maps are right: on trajectories, in metres, against masks, and against the model's own weights."""

from vla_ray.explain.faithfulness.baselines import mean_map, random_maps
from vla_ray.explain.faithfulness.consistency import Claim, Consistency, commentary_consistency, parse_claim
from vla_ray.explain.faithfulness.curves import Curve, CurveScores, FrameCurves, average, evaluate_maps
from vla_ray.explain.faithfulness.dependence import Moved, Verdict, dependence, depends_on_image, perturbed_tiles
from vla_ray.explain.faithfulness.localisation import Localisation, Nuisance, localise, nuisance
from vla_ray.explain.faithfulness.sanity import Stage, between_targets, randomisation_stages, randomise_
from vla_ray.explain.faithfulness.similarity import Similarity, similarity, spearman
from vla_ray.explain.faithfulness.temporal import Temporal, temporal_consistency

__all__ = [
    "Claim",
    "Consistency",
    "Curve",
    "CurveScores",
    "FrameCurves",
    "Localisation",
    "Moved",
    "Nuisance",
    "Similarity",
    "Stage",
    "Temporal",
    "Verdict",
    "average",
    "between_targets",
    "commentary_consistency",
    "dependence",
    "depends_on_image",
    "evaluate_maps",
    "localise",
    "mean_map",
    "nuisance",
    "parse_claim",
    "perturbed_tiles",
    "random_maps",
    "randomisation_stages",
    "randomise_",
    "similarity",
    "spearman",
    "temporal_consistency",
]
