"""From a bundle to a smaller one: formats, methods, calibration, the rewrite of the graphs, and the cost in quality."""
