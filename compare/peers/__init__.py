"""Engines of other projects, run on the baseline's weights if the user has them."""
