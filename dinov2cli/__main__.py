"""`python -m dinov2cli` is the `dino2` command."""

from dinov2cli.cli.main import main

main()
