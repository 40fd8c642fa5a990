"""One form for attention, state spaces and recurrent networks: dynamical systems (DSF, arXiv 2405.15731)."""

from workbench.kernels.systems.convert import to_dsf
from workbench.kernels.systems.layers import (
    linear_attention,
    normalised_attention,
    qlstm,
    reversed_sigmoid,
    rg_lru,
    s6,
    separable_attention,
    ssd,
)
from workbench.kernels.systems.mixing import (
    aft,
    fnet,
    fnet_values,
    linformer,
    long_convolution,
    mlp_mixer,
    nystrom,
)
from workbench.kernels.systems.system import DynamicalSystem
from workbench.kernels.systems.taylor import n_features, taylor_features, taylor_remainder

__all__ = [
    "DynamicalSystem",
    "aft",
    "fnet",
    "fnet_values",
    "linear_attention",
    "linformer",
    "long_convolution",
    "mlp_mixer",
    "n_features",
    "normalised_attention",
    "nystrom",
    "qlstm",
    "reversed_sigmoid",
    "rg_lru",
    "s6",
    "separable_attention",
    "ssd",
    "taylor_features",
    "taylor_remainder",
    "to_dsf",
]
