"""A bundle in, a smaller bundle out: formats, methods, calibration, the rewrite of the graphs, and what it cost in quality."""
