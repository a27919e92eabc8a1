"""vla_ray: vision-language-action models over many frames on Ray, and which pixels an action came from."""

__version__ = "0.1.0"
