"""`python -m model.cli`: the command, where something else starts Python (torchrun)."""

from model.cli.app import main

main()
