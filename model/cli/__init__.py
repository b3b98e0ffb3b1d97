"""The `gpukernels` command."""

from model.cli.app import main

__all__ = ["main"]
