"""What a run needs, what the machine has, and what on the machine would break or slow a run."""
