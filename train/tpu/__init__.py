"""TPUs that are not here: compiling for them, and what their chips send."""
