"""What things cost beside plain torch: python jobs/benchmark.py bench=relevance size=[tiny,mid] (--help)."""

import time

from vla_ray.command_line import run_job
from vla_ray.config import BenchmarkConfig


def main(config: BenchmarkConfig) -> int:
    from vla_ray.evaluation.benchmarks import find_bench  # torch takes seconds to import; a typo should not
    from vla_ray.storage.files import Location, write_json

    result = find_bench(config.bench)(config)
    print(result.text)
    file = Location.of(config.output_dir) / f"benchmarks/{config.bench}_{time.strftime('%y%m%d_%H%M%S')}.json"
    write_json(file, result.content)
    print(f"\nsaved    {file}")
    return 0


if __name__ == "__main__":
    run_job(__file__, BenchmarkConfig, main)
