"""Everything that gets queries, keys and values out of a running model, or edits it; all of it leaves no trace."""
