"""``python -m omni_convert``: the command line."""

from omni_convert.cli import main

main()
