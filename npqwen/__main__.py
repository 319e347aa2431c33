"""`python -m npqwen`."""

from npqwen.commands.cli import main

main()
