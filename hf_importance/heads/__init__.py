"""How a model's loss splits by example, and the closed-form score of each."""
