"""What everything else stands on: Frames, stages, layouts, keys, linear algebra."""
