"""Measure how much memory grows while a run's state is loaded from a checkpoint.

    python tests/benchmarks/resume_memory.py [--layers 15]

Builds an engine in each mode, saves a checkpoint, then builds a second engine in a process of its own and resumes. A
thread reads the process's own memory while the state is loaded: anonymous and shared pages, but not those of mapped
files, which the system can drop at any time. The growth is given as a share of the state, 12 bytes per parameter. The
numbers go to tests/benchmarks/results/.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
STATE_BYTES_PER_PARAMETER = 12  # fp32 master and two moments
POLL_S = 0.002


def own_bytes() -> int:
    """Return the anonymous and shared memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Peak:
    """Follows `own_bytes` in a thread while a block runs."""

    def __enter__(self) -> "Peak":
        self.before = self.peak = own_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def _follow(self) -> None:
        while not self._done.wait(POLL_S):
            self.peak = max(self.peak, own_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = own_bytes()
        self.peak = max(self.peak, self.after)


def make(model: str, out: str, mode: str) -> Any:
    from superoffload import distributed
    from tests.helpers.runs import make_engine

    distributed.init()
    values = {"deepspeed_config": str(ROOT / f"configs/{mode}.json"), "sub_group_size": 20_000_000, "resume": "auto"}
    return make_engine(model, out, **values)


def save_state(model: str, out: str, mode: str) -> dict[str, Any]:
    """Save a fresh engine's state."""
    from superoffload.checkpoint import save

    engine, tokenizer, config = make(model, out, mode)
    assert save.save(engine, tokenizer, config, {"step": 1, "epoch": 0}, {}) is not None
    engine.destroy()
    return {}


def load_state(model: str, out: str, mode: str) -> dict[str, Any]:
    """Resume, and return how much memory grew."""
    from superoffload.checkpoint import resume

    engine, _, config = make(model, out, mode)
    for state in engine.optimizer.optimizer.state.values():  # untouched pages would count as growth
        for value in state.values():
            getattr(value, "zero_", int)()
    source = resume.first_intact(config, resume.find(config))
    assert source is not None
    with Peak() as memory:
        resume.restore(engine, source, trusted=False)
    parameters = sum(flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    engine.destroy()
    state_bytes = parameters * STATE_BYTES_PER_PARAMETER
    grown = memory.peak - memory.before
    return {
        "mode": mode,
        "parameters": parameters,
        "state_bytes": state_bytes,
        "peak_growth_bytes": grown,
        "remaining_growth_bytes": memory.after - memory.before,
        "share_of_state": grown / state_bytes,
    }


def write_model(folder: Path, layers: int) -> None:
    """Write a Llama with random weights, and a tokenizer."""
    import transformers

    from tests.helpers.models import make_tokenizer

    shape = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=4)
    model = transformers.LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def child(action: str, model: Path, out: Path, mode: str) -> dict[str, Any]:
    """Run one of the functions above in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.resume_memory", "--child", action, str(model), str(out), mode]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory that a resume takes.")
    parser.add_argument("--layers", type=int, default=15, help="layers of 16 million parameters each")
    parser.add_argument("--out", type=Path, default=RESULTS / "resume_memory.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        action, *where = options.child
        print(json.dumps({"save": save_state, "load": load_state}[action](*where)))
        return 0
    runs = []
    with tempfile.TemporaryDirectory() as work:
        write_model(Path(work) / "model", options.layers)
        for mode in ("superoffload", "zerooffload"):
            out = Path(work) / mode
            child("save", Path(work) / "model", out, mode)
            runs.append(child("load", Path(work) / "model", out, mode))
            print(json.dumps(runs[-1]), flush=True)
    result = {"command": "python tests/benchmarks/resume_memory.py", "machine": platform.machine(), "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
