"""Build a data set on disk: shards, splits, packing, the build store and its cache."""
