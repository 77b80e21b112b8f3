"""Run the command as `python -m superoffload.commands`."""

from superoffload.commands import main

main()
