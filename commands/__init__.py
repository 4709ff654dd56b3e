"""The commands of `retnet-export`, one module each: parse options, call the Python API, print. They contain no other logic."""
