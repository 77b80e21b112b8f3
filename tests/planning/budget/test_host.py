"""Arithmetic of host memory, by hand."""

from dataclasses import replace

import pytest

from superoffload.model import recomputation
from superoffload.model.flops import ModelShape
from superoffload.planning.budget import host
from superoffload.planning.budget.disk import checkpoint_bytes, convert_bytes, disk_bytes
from superoffload.planning.budget.host import host_bytes, host_peaks, memlock_bytes, shm_bytes
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape

pytestmark = pytest.mark.unit

MIB = 2**20
HEAD, LAYERS = 128256 * 4096, 32
LAYER = (4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, 14336 * 4096, 14336 * 4096, 14336 * 4096)
NORMS = 65 * 4096
PARAMETERS = 8_030_261_248  # of Llama 3.1 8B
LLAMA_8B = Shape(
    name="llama-8b",
    groups=((HEAD, *LAYERS * LAYER, HEAD), 65 * (4096,)),
    frozen=0,
    layers=LAYERS,
    layer=sum(LAYER) + 2 * 4096,
    unit=HEAD,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=128256,
    head=HEAD,
    tied=False,
    experts_per_token=1,
    head_norms=False,
    sinks=False,
    flops=ModelShape(active_parameters=PARAMETERS, attention_width=4096, attention_windows=(0,) * LAYERS),
)
JOB = Job(
    mode="superoffload",
    ranks=1,
    ranks_per_node=1,
    batch=4,
    length=4096,
    accumulation=1,
    ratio=1.0,
    sub_group=400_000_000,
    bucket=400_000_000,
    recompute=True,
    chunked_loss=True,
    eager=False,
    bf16_state=False,
    offload_params=False,
    pin_memory=True,
    saves=True,
    kept=2,
    exports=False,
)
ZERO = replace(JOB, mode="zerooffload")


def state(job: Job, shape: Shape = LLAMA_8B) -> int:
    """Return the bytes that grow with the model, without those of processes."""
    return sum(size for part, size in host_bytes(shape, job).items() if part not in ("runtime", "libraries"))


def test_the_shape_is_that_of_llama_8b() -> None:
    assert LLAMA_8B.parameters == PARAMETERS == 2 * HEAD + LAYERS * sum(LAYER) + NORMS


def test_llama_8b_in_both_modes() -> None:
    assert host_bytes(LLAMA_8B, JOB) == {
        "masters": 4 * PARAMETERS,
        "moments": 8 * PARAMETERS,
        "gradients": 4 * PARAMETERS,
        "staging": 2 * PARAMETERS,
        "accumulation": 0,
        "weights": 0,
        "activations": 0,
        "pinned": 0,
        "device": 0,
        "runtime": host.LAUNCHER_BYTES + host.RANK_BYTES + host.OPTIMIZER_PROCESS_BYTES + host.CUDA_BYTES,
        "libraries": host.LIBRARIES_BYTES,
    }
    small = 4 * NORMS  # a sub-group of 1,064,960 bytes, the only one below 64 MiB
    assert host_bytes(LLAMA_8B, ZERO) == {
        **host_bytes(LLAMA_8B, JOB),
        "staging": 0,
        "accumulation": 2 * PARAMETERS,
        "pinned": 2 * MIB - small,
        "runtime": host.LAUNCHER_BYTES + host.RANK_BYTES + host.CUDA_BYTES,
    }


def test_without_the_options_of_recipes_pinned_memory_is_rounded_up() -> None:
    """The embeddings have 2.1 GB of gradients; two layers 1.74 GB; all sums 16.06 GB."""
    assert host_bytes(LLAMA_8B, replace(JOB, pinned_rounding=True))["pinned"] == 0
    blocks = 2 * 2**31 + 16 * 2**31 + 2 * MIB + 2**34
    sizes = 4 * PARAMETERS + 2 * PARAMETERS
    # The sub-group of the embedding holds no more, so that the layers follow in pairs, and the head at the end.
    assert host_bytes(LLAMA_8B, replace(ZERO, pinned_rounding=True))["pinned"] == blocks - sizes
    assert host_bytes(LLAMA_8B, replace(ZERO, pinned_rounding=True, pin_memory=False))["pinned"] == 0


def test_inputs_of_layers_on_the_host() -> None:
    """Of 4 x 4096 tokens each has 128 MiB. Buffers are rounded up, torch's smaller blocks to a power of two."""
    offload = replace(JOB, offload_activations=True)
    more = {key: size - host_bytes(LLAMA_8B, JOB)[key] for key, size in host_bytes(LLAMA_8B, offload).items()}
    assert {key: size for key, size in more.items() if size} == {"activations": LAYERS * 128 * MIB}
    assert host_peaks(LLAMA_8B, offload)["saving"] - host_peaks(LLAMA_8B, JOB)["saving"] == LAYERS * 128 * MIB
    odd = host_bytes(LLAMA_8B, replace(offload, batch=1, length=4500))  # 35.2 MiB
    assert odd["activations"] == LAYERS * 36 * MIB and odd["pinned"] == LAYERS * 28 * MIB
    assert odd["activations"] == LAYERS * recomputation.buffer_bytes(2 * 4096 * 4500)
    assert host_bytes(LLAMA_8B, replace(offload, accumulation=4))["activations"] == LAYERS * 128 * MIB
    assert host_bytes(LLAMA_8B, replace(offload, pin_memory=False, pinned_rounding=True, length=5000))["pinned"] == (
        LAYERS * (256 - 160) * MIB
    )


def test_the_device_share_is_not_on_the_host() -> None:
    """Of 19 sub-groups int(0.2 x 19) = 3 are on the device: the embedding and two of two layers each."""
    on_device = HEAD + 4 * sum(LAYER)
    assert state(replace(JOB, ratio=0.8)) == 18 * (PARAMETERS - on_device)
    held = host_bytes(LLAMA_8B, replace(ZERO, ratio=0.8))
    assert held["gradients"] == 4 * (PARAMETERS - on_device)
    assert held["accumulation"] == 2 * PARAMETERS  # of all of them
    peaks = host_peaks(LLAMA_8B, replace(JOB, ratio=0.8))
    assert peaks["saving"] - peaks["steady"] == 4 * HEAD  # a tensor of the device on its way to the file


def test_blocks_of_the_device_share_are_kept_once() -> None:
    """The gradients of the device's sub-groups are pinned first, and their blocks serve those of the host."""
    rounded = replace(ZERO, pinned_rounding=True, ratio=0.8)
    held = host_bytes(LLAMA_8B, rounded)
    assert held["pinned"] + held["gradients"] + held["accumulation"] == 14 * 2**31 + 2**31 + 2 * MIB + 2**34
    nothing = host_bytes(LLAMA_8B, replace(rounded, ratio=0.0))
    assert nothing["gradients"] == 0
    assert nothing["pinned"] + nothing["accumulation"] == 2**31 + 2 * MIB + 2**34


def test_bf16_halves_the_state() -> None:
    assert state(replace(JOB, bf16_state=True)) == 10 * PARAMETERS
    plain = replace(ZERO, pin_memory=False)
    assert state(plain) - state(replace(plain, bf16_state=True)) == 8 * PARAMETERS
    assert checkpoint_bytes(LLAMA_8B, replace(JOB, bf16_state=True)) * 2 == checkpoint_bytes(LLAMA_8B, JOB)


def test_accumulation_needs_a_buffer_in_superoffload_too() -> None:
    job = replace(JOB, accumulation=2)
    assert host_bytes(LLAMA_8B, job)["accumulation"] == 2 * PARAMETERS
    assert host_bytes(LLAMA_8B, replace(job, sum_bytes=4))["accumulation"] == 4 * PARAMETERS
    assert host_bytes(LLAMA_8B, replace(ZERO, accumulation=2)) == host_bytes(LLAMA_8B, ZERO)


def test_ranks_of_one_machine_and_of_several() -> None:
    one, two = (host_bytes(LLAMA_8B, replace(JOB, ranks=n, ranks_per_node=n)) for n in (1, 2))
    assert one["masters"] == two["masters"]
    assert two["runtime"] + host.LAUNCHER_BYTES == 2 * one["runtime"]
    half = host_bytes(LLAMA_8B, replace(JOB, ranks=2, ranks_per_node=1))
    assert half["masters"] * 2 == one["masters"]
    assert half["runtime"] == one["runtime"]
    odd = host_bytes(LLAMA_8B, replace(JOB, ranks=3, ranks_per_node=3))["masters"]  # padded to a multiple of 3
    assert one["masters"] < odd < one["masters"] + 3 * 4 * 300


def test_weights_on_the_host() -> None:
    held = host_bytes(LLAMA_8B, replace(JOB, offload_params=True))
    assert held["weights"] == 2 * PARAMETERS
    # Partitions of up to 64 MiB stay in torch's cache: in each layer two of 32 MiB and two of 8 MiB, and the norms.
    cached = LAYERS * 80 * MIB + 65 * 8192
    assert held["pinned"] == cached + 2**20 - 2 * NORMS
    frozen = replace(LLAMA_8B, frozen=1000)
    assert host_bytes(frozen, replace(JOB, offload_params=True))["weights"] == 2 * PARAMETERS + 2000


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_more_of_anything_takes_more(mode: str, on_cpu: bool) -> None:
    base = replace(JOB, mode=mode, on_cpu=on_cpu, ratio=0.5, sub_group=10**8)
    larger = replace(LLAMA_8B, groups=((*LLAMA_8B.groups[0], *LAYER), LLAMA_8B.groups[1]))
    least = host_peaks(LLAMA_8B, base)
    more = [
        host_peaks(larger, base),
        host_peaks(LLAMA_8B, replace(base, accumulation=2)),
        host_peaks(LLAMA_8B, replace(base, sum_bytes=4)),
        host_peaks(LLAMA_8B, replace(base, offload_params=True)),
        host_peaks(LLAMA_8B, replace(base, pinned_rounding=True)),
        host_peaks(LLAMA_8B, replace(base, ranks=2, ranks_per_node=2)),
    ]
    for found in more:
        assert all(found[phase] >= least[phase] for phase in least)
    assert any(found != least for found in more[1:])
    assert all(size >= least["loading"] for size in least.values())
    assert host_peaks(LLAMA_8B, replace(base, ratio=1.0))["steady"] >= least["steady"]


def test_steps_take_no_more_than_is_held_between_them() -> None:
    peaks = host_peaks(LLAMA_8B, replace(JOB, accumulation=2))
    assert peaks["first step"] == peaks["steady"] == peaks["saving"] == peaks["resuming"]
    loading = host.LAUNCHER_BYTES + host.LIBRARIES_BYTES + host.LOADED_BYTES + host.CUDA_BYTES
    assert peaks["loading"] == loading
    little = replace(JOB, ratio=0.0)  # the weights pass through the host all the same
    assert host_peaks(LLAMA_8B, little)["first step"] == loading + 2 * PARAMETERS


def test_an_export_takes_a_shard_and_a_tensor() -> None:
    assert "export" not in host_peaks(LLAMA_8B, JOB)
    peaks = host_peaks(LLAMA_8B, replace(JOB, exports=True))
    assert peaks["export"] - peaks["steady"] == 8 * HEAD + 5 * 10**9


def test_disk() -> None:
    assert checkpoint_bytes(LLAMA_8B, JOB) == 12 * PARAMETERS
    assert disk_bytes(LLAMA_8B, JOB) == 3 * 12 * PARAMETERS  # two are kept until the third is complete
    assert disk_bytes(LLAMA_8B, replace(JOB, exports=True)) == 38 * PARAMETERS
    assert disk_bytes(LLAMA_8B, replace(JOB, saves=False)) == 0
    assert convert_bytes(LLAMA_8B, JOB) == 24 * PARAMETERS
    frozen = replace(LLAMA_8B, frozen=1000)
    assert checkpoint_bytes(frozen, JOB) == 12 * PARAMETERS + 2000


def test_limits_of_the_system() -> None:
    assert (shm_bytes(LLAMA_8B, JOB), memlock_bytes(LLAMA_8B, JOB)) == (0, 0)
    two = replace(JOB, ranks=2, ranks_per_node=2)
    assert shm_bytes(LLAMA_8B, two) == 2**30
    assert memlock_bytes(LLAMA_8B, two) == 0
    assert memlock_bytes(LLAMA_8B, replace(two, ranks=4)) == 2 * 2**30
    assert memlock_bytes(LLAMA_8B, replace(two, ranks=4, on_cpu=True)) == 0
