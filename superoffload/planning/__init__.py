"""Memory and time of a run, known before it starts: `superoffload plan`, `superoffload doctor`, and the preflight."""
