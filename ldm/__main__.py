"""`python -m ldm`: the command line."""

from ldm.cli import main

main()
