"""A site's data set: manifest, readers, importers, checks, splits, and a generator for the demo."""
