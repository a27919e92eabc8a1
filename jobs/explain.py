"""Maps of which pixels an action came from: python jobs/explain.py run=NAME methods=[...] (--help)."""

from vla_ray.command_line import run_job
from vla_ray.config import ExplainConfig


def main(config: ExplainConfig) -> int:
    from vla_ray.pipelines.explain import explain  # torch takes seconds to import; a typo should not

    return explain(config)


if __name__ == "__main__":
    run_job(__file__, ExplainConfig, main)
