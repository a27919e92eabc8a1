"""vla_ray: vision-language-action models over many frames on Ray, and which pixels an action came from.

For a notebook: `from vla_ray.policy import Frame, SimLingo, explain`; for many frames: the jobs.
"""

__version__ = "0.1.0"
