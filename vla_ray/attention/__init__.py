"""Attention probabilities and their gradients, through transformers' attention interface: no patching, no hooks."""

from vla_ray.attention.recording import AttentionRecorder

__all__ = ["AttentionRecorder"]
