"""Write files and builds atomically, keep records of builds, and create Arrow arrays."""
