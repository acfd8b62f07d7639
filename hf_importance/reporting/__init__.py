"""What a run says: log entries, the progress bar, model cards, the figure of a run."""
