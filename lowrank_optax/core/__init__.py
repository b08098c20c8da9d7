"""The ground of all other packages: Frames, stages, layouts, keys, linear algebra."""
