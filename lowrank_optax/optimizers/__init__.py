"""The methods by name: each a choice of where, step and back."""
