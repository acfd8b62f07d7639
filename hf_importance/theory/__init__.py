"""The mathematics, on torch and numpy alone: what to draw, with what weights, what it is worth, what it costs."""
