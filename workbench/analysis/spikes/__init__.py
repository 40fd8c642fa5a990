"""What the neurons of a spiking model do: when they fire, which never do, and what that costs."""

from workbench.analysis.spikes.activity import spike_activity
from workbench.analysis.spikes.result import SpikeActivity

__all__ = ["SpikeActivity", "spike_activity"]
