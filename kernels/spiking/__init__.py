"""Spiking networks: neurons that leak and fire over steps of time, and attention between spikes."""

from workbench.kernels.spiking.attention import spiking_attention
from workbench.kernels.spiking.neurons import Fired, leaky_fire, steps_between_spikes

__all__ = ["Fired", "leaky_fire", "spiking_attention", "steps_between_spikes"]
