"""Output for people: metrics, progress, tables, plots."""
