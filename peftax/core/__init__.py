"""Trees to trees: paths, partitions, sites, methods."""
