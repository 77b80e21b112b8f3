"""Imported once, by the process that `tests.ranks` forks ranks from."""

import functools

import cpuinfo
import torch._inductor.compile_fx  # noqa: F401  DeepSpeed's engine does, for an optimizer nobody asked for

import superoffload.engine
import superoffload.isolation
import superoffload.resume
import superoffload.run  # noqa: F401

# DeepSpeed asks three times for each engine, for more than a second each time.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
