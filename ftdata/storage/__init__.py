"""Write files and builds (tokenized data sets) atomically, record builds, and create Arrow arrays."""
