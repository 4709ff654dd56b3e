"""Will it fit, and how fast will it be: sizes and speed of a model on a device, without running it."""
