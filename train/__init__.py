"""Trains the models with the optimizers of lowrank_optax: `python -m train --help`."""
