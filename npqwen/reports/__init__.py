"""Reports of `npqwen info`, `npqwen bench` and `npqwen eval`: measurements, tables, JSON."""
