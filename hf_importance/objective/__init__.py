"""The loss that is trained on and the scores that are drawn by: what is asked of a model."""
