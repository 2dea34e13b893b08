"""The command line as `python -m merganser`."""

from .cli import main

main()
