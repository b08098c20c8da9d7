"""TPUs that are not here: compiling for them, and the traffic of their chips."""
