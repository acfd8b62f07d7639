"""One training run: does what a sampler says. A step can be read in :mod:`.run`."""
