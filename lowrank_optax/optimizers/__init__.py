"""The named optimizers."""
