"""Questions asked of attention: one file per question. Public names are in `workbench/__init__.py`."""
