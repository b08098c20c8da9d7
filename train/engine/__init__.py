"""One training step: optimizer, mesh, sharded weights, memory."""
