"""The optimizer process: receive a task, compute, reply."""
