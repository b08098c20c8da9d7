"""The papers' experiments and ours: which runs, and how they are launched."""
