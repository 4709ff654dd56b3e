"""Engines that nobody here wrote, run on the baseline's weights if the user has them."""
