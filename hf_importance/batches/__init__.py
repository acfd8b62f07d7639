"""Batches as tensors: what is put into them, how rows of several become one, where more come from."""
