"""Many interventions over many inputs: one engine for importance, patching and circuits."""
