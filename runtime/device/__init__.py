"""The machine: CUDA, what a Jetson reports, and what is missing here."""
