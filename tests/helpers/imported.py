"""Imported once, by the process from which `tests.helpers.ranks` and `tests.helpers.forked` fork."""

import functools
import gc

import cpuinfo
import datasets  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401  DeepSpeed's engine imports it while building an optimizer
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import superoffload.checkpoint.resume
import superoffload.commands
import superoffload.data.loader
import superoffload.export.weights
import superoffload.model.isolation
import superoffload.model.loss_kernel
import superoffload.model.vocabulary
import superoffload.training.engine
import superoffload.training.evaluation
import superoffload.training.run
import superoffload.training.run_control
import superoffload.training.tracking  # noqa: F401
import tests.helpers.forked
import tests.helpers.nursery
import tests.helpers.offload_training  # noqa: F401  caches cpuinfo's result
from superoffload.offload.zero3 import contract

cpuinfo.get_cpu_info()
get_checkpoint_conversion_mapping("llama")  # compiles the patterns of every architecture
contract.problems = functools.cache(contract.problems)  # what DeepSpeed's source holds, which no rank changes
contract.problems()
gc.collect()
gc.freeze()  # DeepSpeed collects garbage for each engine; what was imported is none
