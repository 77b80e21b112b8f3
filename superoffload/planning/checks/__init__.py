"""The checks of `superoffload doctor`, by subject. Each returns findings; arithmetic and texts are pure functions."""
