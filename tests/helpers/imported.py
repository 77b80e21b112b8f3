"""Imported once, by the process from which `tests.helpers.ranks` forks ranks."""

import cpuinfo
import torch._inductor.compile_fx  # noqa: F401  DeepSpeed's engine imports it while building an optimizer

import superoffload.checkpoint.resume
import superoffload.model.isolation
import superoffload.training.engine
import superoffload.training.run  # noqa: F401
import tests.helpers.offload_training  # noqa: F401  caches cpuinfo's result

cpuinfo.get_cpu_info()
