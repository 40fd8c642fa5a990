"""What one attaches: the workbench, its interventions, and what records while a model runs."""
