"""What all views stand on: the view and its spec, kinds, selection, widget, page, registry, still pictures."""
