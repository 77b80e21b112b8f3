"""The trainer's side: decide what to compute, start and watch the optimizer process, bind cores, lock pages."""
