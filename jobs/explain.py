"""Maps of which pixels an action came from: python jobs/explain.py run=NAME methods=[...] (--help).

Of a policy: python jobs/explain.py model=paligemma-tiny run=NAME, where the run is one of jobs/infer.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

from vla_ray.command_line import run_job
from vla_ray.config import ExplainConfig, PolicyExplainConfig


def main(config: ExplainConfig) -> int:
    from vla_ray.pipelines.explain import explain  # torch takes seconds to import; a typo should not

    return explain(config)


def explain_policy(config: PolicyExplainConfig) -> int:
    from vla_ray.bundled import bundled_predictions
    from vla_ray.pipelines.explain_policy import explain_policy as explain

    root = Path(__file__).resolve().parent.parent
    run = config.run or Path(bundled_predictions(root, config.output_dir)).name
    return explain(replace(config, run=run))


if __name__ == "__main__":
    if any(arg.startswith("model=paligemma") for arg in sys.argv[1:]):
        run_job(__file__, PolicyExplainConfig, explain_policy, config="explain_policy")
    run_job(__file__, ExplainConfig, main)
