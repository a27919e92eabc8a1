"""What attention saw and what mattered of it, through transformers' attention interface: no patching of modules.

`AttentionRecorder` keeps every matrix and its gradient; `RelevanceTape` folds relevance while backward runs and keeps
none.
"""

from vla_ray.attention.recording import AttentionRecorder
from vla_ray.attention.relevance import RelevanceTape

__all__ = ["AttentionRecorder", "RelevanceTape"]
