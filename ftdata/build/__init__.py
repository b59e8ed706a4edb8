"""Build a data set on disk: create shards, assign splits, pack examples, and write and verify the files."""
