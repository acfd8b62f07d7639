"""What goes into a checkpoint, in what form, and which checkpoints are whole."""
