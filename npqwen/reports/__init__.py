"""Reports of `npqwen info` and `npqwen bench`."""
