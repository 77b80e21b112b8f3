"""Where the numbers of a run go, one module per tracker; each imports its library only when it starts.

`training.tracking` starts them and guards the run against their failures.
"""
