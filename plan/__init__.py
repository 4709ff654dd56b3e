"""Predicts memory and speed of a model on a device, without running it."""
