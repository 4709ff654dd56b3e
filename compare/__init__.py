"""A bundle against a KV-cache Transformer of the same size, measured side by side on the user's own machine."""
