"""Linear and recurrent mixers as dynamical systems: the maps of gates, decays, delta rules and short filters."""

from workbench.kernels.recurrent.filter import FilterPattern
from workbench.kernels.recurrent.functional import gated_delta_rule, gated_linear_attention
from workbench.kernels.recurrent.general_delta import GeneralDeltaPattern
from workbench.kernels.recurrent.naive import naive_recurrence, naive_recurrent_pattern
from workbench.kernels.recurrent.pattern import RecurrentPattern
from workbench.kernels.recurrent.wkv import WKVPattern

__all__ = [
    "FilterPattern",
    "GeneralDeltaPattern",
    "RecurrentPattern",
    "WKVPattern",
    "gated_delta_rule",
    "gated_linear_attention",
    "naive_recurrence",
    "naive_recurrent_pattern",
]
