"""The commands of `retnet-export`, one module each: parse options, call the Python API, print. No logic of their own."""
