"""`python -m retnet_export` is `retnet-export`."""

from retnet_export.cli import app

app()
