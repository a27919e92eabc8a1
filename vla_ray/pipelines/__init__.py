"""Ray Data graphs around the plain stages, and what a driver does: manifest, resume, progress, error budget."""
