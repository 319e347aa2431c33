"""`python -m npqwen`."""

from npqwen.cli import main

main()
