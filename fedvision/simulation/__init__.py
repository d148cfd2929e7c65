"""A whole federation on this machine: Flower's simulation engine, or one process for a single site."""
