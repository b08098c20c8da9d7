"""The machine: paths, atomic writes, signals, processes."""
