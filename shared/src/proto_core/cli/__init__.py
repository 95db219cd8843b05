"""The command line that every app instantiates.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's; ``list`` reads the catalogue; an app adds commands
of its own. Nothing here imports torch: that happens when work starts, so ``--help`` answers at once.
"""

from proto_core.cli.app import App, Command, instantiate, main

__all__ = ["App", "Command", "instantiate", "main"]
