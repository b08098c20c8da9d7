"""A run: the loop, its checkpoints, its folder, what it leaves behind."""
