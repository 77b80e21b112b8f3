"""The MLP in tiles: found by trying, equal to untiled within a bound, and with less memory."""

import weakref
from typing import Any

import pytest
import torch

from superoffload import distributed
from superoffload.data.collate import collate
from superoffload.errors import UserError
from superoffload.model import kernels, tiled_mlp
from superoffload.model.head import summed_loss
from superoffload.model.tiles import tile_tokens
from tests.helpers.packs import PACKS, PADDED, VARLEN, document, tiny

pytestmark = pytest.mark.unit
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("2 LlamaMLP", {}),
    "qwen3": ("2 Qwen3MLP", {}),
    "gemma3_text": ("2 Gemma3MLP", {"head_dim": 8}),
    "phi": ("2 PhiMLP", {}),  # its weights have biases, and its MLP runs beside the attention
    "qwen3_moe": ("2 Qwen3MoeSparseMoeBlock", {}),
    "mixtral": ("2 MixtralSparseMoeBlock", {}),
    "gpt_oss": ("2 GptOssMLP", EXPERTS),  # also returns what its router chose
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)


def results(model: Any, recompute: bool = False, layout: Any = VARLEN) -> list[torch.Tensor]:
    """Return logits and gradients of a batch of two packs or rows."""
    model.train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    packs = PACKS if layout.packs else [[document(24, seed)] for seed in range(2)]
    inputs = collate(packs, 2, layout).inputs
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    summed_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
    return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def make(kind: str) -> Any:
    return tiny(kind, "eager", **KINDS[kind][1]) if kind in KINDS else tiny(kind, "eager")


@pytest.mark.parametrize(
    ("tokens", "tiles", "expected"),
    [
        (100, 1, 100),
        (100, 4, 25),
        (100, 7, 15),
        (3, 8, 1),
        (1, 4, 1),
        (64, "auto", 32),
        (65, "auto", 22),
        (8, "auto", 8),
    ],
)
def test_tokens_of_a_tile(tokens: int, tiles: Any, expected: int) -> None:
    assert tile_tokens(tokens, 32, tiles) == expected


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_compute_what_the_whole_does(kind: str, recompute: bool, caplog: Any) -> None:
    plain, model = make(kind), make(kind)
    names = list(model.state_dict())
    with caplog.at_level("INFO", "superoffload"):
        tiled_mlp.use(5, model)
    assert caplog.messages[-1] == f"MLP: in 5 tiles, in {KINDS[kind][0]}"
    assert list(model.state_dict()) == names
    for layout in (VARLEN, PADDED):
        torch.testing.assert_close(
            results(model, recompute, layout), results(plain, layout=layout), atol=2e-5, rtol=1e-4
        )


def test_the_gradients_of_weights_in_bf16_are_within_the_bound() -> None:
    """The bound of `_Tiled.backward`, by the gradients of the tiles in float32; a sum in bf16 does not keep it."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.SiLU(), torch.nn.Linear(48, 32)).bfloat16()
    states, given = torch.randn(2, 1, 640, 32).bfloat16()
    parameters, size = list(mlp.parameters()), 10

    def of(function: Any, part: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(function(part.clone().requires_grad_()), parameters, gradient))

    found = of(lambda states: tiled_mlp._run(mlp, parameters, states, size), states, given)
    tiles = [of(mlp, *pair) for pair in zip(states.split(size, 1), given.split(size, 1), strict=True)]
    naive = [sum(gradients) for gradients in zip(*tiles, strict=True)]
    broken = False
    epsilon = torch.finfo(torch.bfloat16).eps
    for gradient, in_bf16, *parts in zip(found, naive, *tiles, strict=True):
        exact = torch.stack([part.double() for part in parts]).sum(0)
        assert ((gradient.double() - exact).abs() <= epsilon / 2 * exact.abs() + 1e-4).all()
        broken |= not bool(((in_bf16.double() - exact).abs() <= epsilon / 2 * exact.abs() + 1e-4).all())
    assert broken
    for gradient, whole in zip(found, of(mlp, states, given), strict=True):
        assert (gradient.float() - whole.float()).norm() <= epsilon * whole.float().norm()


def counted(model: Any) -> list[int]:
    """Let the first MLP count the tokens of its calls."""
    tokens: list[int] = []
    product = model.model.layers[0].mlp.down_proj
    product.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[:-1].numel()))
    return tokens


@pytest.mark.parametrize(("kind", "runs"), [("llama", 2), ("gemma3_text", 3)])
def test_recomputation_leaves_the_mlp_to_its_tiles_unless_a_norm_follows(kind: str, runs: int) -> None:
    model = make(kind)
    tiled_mlp.use(5, model)
    tokens = counted(model)
    results(model, recompute=True)
    positions = sum(tokens) // runs
    assert sum(tokens) == runs * positions and len(tokens) == runs * 5
    assert max(tokens) == -(-positions // 5)


def test_evaluation_and_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = make("llama").eval(), make("llama").eval()
    tiled_mlp.use(4, model)
    tokens = counted(model)
    ids = torch.as_tensor(document(9, 0)[0])[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert tokens == [3, 3, 3]
    answers = [one.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True) for one in (plain, model)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("frozen", ["mlp", "all but the MLPs", "a weight"])
def test_frozen_weights(frozen: str) -> None:
    plain, model = make("llama"), make("llama")
    for one in (plain, model):
        for name, parameter in one.named_parameters():
            inside = ".mlp." in name
            off = {"mlp": inside, "all but the MLPs": not inside, "a weight": "up_proj" in name}[frozen]
            parameter.requires_grad_(not off)
    tiled_mlp.use(5, model)
    found, expected = results(model), results(plain)
    assert len(found) == len(expected) > 1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_with_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled", lambda: kernels.Kernels(kernels.rms_norm, kernels.swiglu, kernels.rotate))
    plain, model = make("llama"), make("llama")
    kernels.use("compiled", model)
    tiled_mlp.use("auto", model)
    torch.testing.assert_close(results(model), results(plain), atol=2e-5, rtol=1e-4)


class Mixing(torch.nn.Module):
    """Adds to each token the one before it, as no MLP does."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp(states + torch.nn.functional.pad(states, (0, 0, 1, -1)))
        return result


def wrap(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = Mixing(layer.mlp)
    return model


class Told(torch.nn.Module):
    """May get more than the states, which its layer would pass on."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, states: torch.Tensor, number: int | None = None) -> torch.Tensor:
        result: torch.Tensor = self.mlp(states)
        return result


def tell(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = Told(layer.mlp)
    return model


def drop(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    return model


def route(model: Any) -> Any:
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (wrap, "llama", "layer 0 has no MLP that works token by token; .*mlp: the results of tiles differ by"),
        (tell, "llama", "layer 0 has no MLP that works token by token; .*mlp: it takes more than its input"),
        (drop, "llama", "layer 0 has no MLP that works token by token; .*mlp: the results of tiles differ by"),
        (route, "qwen3_moe", "output_router_logits is set: the loss of a router is taken over all tokens"),
    ],
)
def test_a_model_that_tiles_do_not_suit(change: Any, kind: str, words: str, caplog: Any) -> None:
    model = change(make(kind))
    with pytest.raises(UserError, match=rf"^--tiled_mlp 4: does not suit \w+ \({words}.*\); use auto or 0$"):
        tiled_mlp.use(4, model)
    with caplog.at_level("INFO", "superoffload"):
        tiled_mlp.use("auto", model)
    assert caplog.messages[-1].startswith(f"MLP: not in tiles, because they do not suit {type(model).__name__} (")
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_module_that_another_rank_rejects_is_not_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is decided together: the next one gathers other weights, and a tiled module is gathered as a whole."""
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: False)
    with pytest.raises(UserError, match="mlp: another rank rejected it"):
        tiled_mlp.use(4, make("llama"))


def test_the_activations_of_one_tile_exist_at_a_time() -> None:
    model = make("llama")
    tiled_mlp.use(8, model)
    alive: list[int] = []
    living: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(_: Any, inputs: Any) -> None:
        living.add(inputs[0].untyped_storage())
        alive.append(len(living))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(watch)
    results(model)
    assert len(alive) == 2 * 2 * 8 and max(alive) == 1
