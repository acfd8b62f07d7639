"""What decides which examples are trained on: one file a method. The protocol is in :mod:`.sampler`."""
