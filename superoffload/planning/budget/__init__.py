"""The memory of a run, from the shape of its model and its settings: pure arithmetic; imports no torch."""
