"""The choices of a run: options, methods, presets, ranks."""
