"""`python -m autocompress` is the command line."""

from .cli import main

main()
