"""What attention saw and what mattered of it, through transformers' attention interface: no patching of modules.

Models run with `set_attn_implementation(IMPLEMENTATION)`. An open `AttentionRecorder` then keeps every matrix, so that
its gradient can be asked for; an open `RelevanceTape` folds relevance while backward runs and keeps none.
"""

from vla_ray.attention.recording import AttentionRecorder
from vla_ray.attention.relevance import Chain, RelevanceTape
from vla_ray.attention.watch import IMPLEMENTATION

__all__ = ["IMPLEMENTATION", "AttentionRecorder", "Chain", "RelevanceTape"]
