"""The command line: `npqwen` and its commands."""
