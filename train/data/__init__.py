"""From text or token files to batches of windows."""
