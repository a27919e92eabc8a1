"""Ray Data graphs around the plain stages, and what a driver does: manifest, resume, progress, error budget."""

import vla_ray.before_ray  # noqa: F401  # before any of these modules imports ray
