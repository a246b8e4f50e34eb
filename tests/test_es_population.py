"""The fused forward on small modules: every member gets its own weights, and the model gets its own back."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from es_trl.es import NoiseBank, Population, PopulationForward, PopulationShapeError, Site


SIGMA = 0.3


class Toy(nn.Module):
    """A denoiser of one layer, called by keyword as diffusers does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states):
        return self.layer(hidden_states)


LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (5, 6)),
    "linear on vectors": (nn.Linear(6, 4), (6,)),
    "linear on maps": (nn.Linear(6, 4), (2, 3, 6)),
    "convolution": (nn.Conv2d(6, 4, 3, padding=1), (6, 7, 7)),
    "strided convolution": (nn.Conv2d(6, 4, 3, stride=2, bias=False), (6, 9, 8)),
    "dilated convolution": (nn.Conv2d(6, 4, 3, padding=2, dilation=2), (6, 7, 7)),
    "grouped convolution": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 7, 7)),
    "1x1 convolution": (nn.Conv2d(6, 4, 1), (6, 4, 4)),
}


def build(layer, size=4, rank=2, left=False, additive=False, antithetic=True):
    """A site on `layer`, its population, and each member's weight written out."""
    frozen = layer.weight.detach().flatten(1)
    if left:
        theta, factor = nn.Parameter(torch.randn(3, frozen.shape[1])), torch.randn(frozen.shape[0], 3)
    else:
        theta, factor = nn.Parameter(torch.randn_like(frozen) if additive else frozen.clone()), None
    site = Site("layer.weight", layer, theta, left=factor, additive=additive)
    population = Population(size, antithetic)
    factors = NoiseBank(0, {site.name: tuple(theta.shape)}, rank).draw(0, range(population.num_directions))
    chosen = factors[site.name].select(torch.tensor(population.directions(range(size))))
    signs = population.signs(range(size))
    weights = theta.detach() + SIGMA * signs[:, None, None] * chosen.dense()
    if left:
        weights = factor @ weights
    if additive:
        weights = frozen + weights
    return site, {site.name: chosen}, signs, weights


def merged_outputs(layer, weights, x):
    """Member by member, each weight copied into the layer. `x` is `(M, rows, ...)`."""
    kept = layer.weight.detach().clone()
    outputs = []
    for weight, rows in zip(weights, x, strict=True):
        layer.weight.data.copy_(weight.view_as(layer.weight))
        outputs.append(layer(rows))
    layer.weight.data.copy_(kept)
    return torch.stack(outputs)


CASES = [(name, kind) for name in LAYERS for kind in ("plain", "left", "additive")]
CASES = [(name, kind) for name, kind in CASES if kind == "plain" or "convolution" not in name]


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guided"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_fused_equals_merged_weights_for_every_member(name, kind, copies):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    site, factors, signs, weights = build(layer, left=kind == "left", additive=kind == "additive")
    x = torch.randn(copies, 4, 3, *shape)  # guidance stacks whole batches
    toy = Toy(layer)
    with PopulationForward(toy, [site], SIGMA).members(factors, signs, rows=3):
        fused = toy(hidden_states=x.flatten(0, 2))
    expected = torch.stack([merged_outputs(layer, weights, half) for half in x])
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.1, "members differ"
    torch.testing.assert_close(fused, expected.flatten(0, 2), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "additive"])
def test_one_member_needs_no_rows_to_be_told_apart(kind):
    """Where a model flattens its batch, members run one at a time through the same context."""
    layer = nn.Linear(6, 4)
    site, factors, signs, weights = build(layer, additive=kind == "additive")
    x = torch.randn(3, 5, 6)
    toy = Toy(layer)
    forward = PopulationForward(toy, [site], SIGMA)
    for member in range(4):
        alone = {site.name: factors[site.name].select(torch.tensor([member]))}
        with forward.members(alone, signs[member : member + 1], rows=3):
            drawn = layer(x.flatten(0, 1))
        torch.testing.assert_close(drawn, merged_outputs(layer, weights[member, None], x[None])[0].flatten(0, 1))


@torch.no_grad()
def test_independent_members():
    layer = nn.Linear(6, 4)
    site, factors, signs, weights = build(layer, size=3, antithetic=False)
    x = torch.randn(3, 2, 5, 6)
    toy = Toy(layer)
    with PopulationForward(toy, [site], SIGMA).members(factors, signs, rows=2):
        fused = toy(x.flatten(0, 1))
    torch.testing.assert_close(fused, merged_outputs(layer, weights, x).flatten(0, 1))


@torch.no_grad()
def test_the_sum_is_fp32_and_only_the_product_is_cast():
    """A perturbation far below bfloat16's resolution of theta still moves the weight where theta is close to zero."""
    layer = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
    site, factors, signs, weights = build(layer)
    assert site.theta.dtype == torch.bfloat16
    site.theta = nn.Parameter(torch.randn(4, 6) * 1e-3)
    toy, x = Toy(layer), torch.randn(4, 1, 6, dtype=torch.bfloat16)
    with PopulationForward(toy, [site], 1e-3).members(factors, signs, rows=1):
        fused = toy(x.flatten(0, 1))
    exact = site.theta + 1e-3 * signs[:, None, None] * factors[site.name].dense()
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused, merged_outputs(layer, exact, x).flatten(0, 1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "rows"),
    [
        (lambda toy: toy(torch.randn(7, 5, 6)), 2),  # not a multiple of members x rows
        (lambda toy: toy(torch.randn(4, 5, 6)), 2),
        (lambda toy: toy.layer(torch.randn(8, 5, 6)), 2),  # the denoiser itself was never called
    ],
    ids=["odd", "too few", "elsewhere"],
)
def test_rows_that_cannot_be_mapped_are_an_error(call, rows):
    toy = Toy(nn.Linear(6, 4))
    site, factors, signs, _ = build(toy.layer)
    with PopulationForward(toy, [site], SIGMA).members(factors, signs, rows=rows):
        with pytest.raises(PopulationShapeError, match="layer.weight sees . rows .* 4 members of 2 images"):
            call(toy)


class Reshaped(Toy):
    """A denoiser whose layer sees its rows in another shape."""

    def __init__(self, layer, into, back):
        super().__init__(layer)
        self.into, self.back = into, back

    def forward(self, hidden_states):
        return self.back(self.layer(self.into(hidden_states)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("into", "back"),
    [
        (lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (-1, 5))),  # side by side: frames, tokens
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),  # tokens first
        (lambda x: x.chunk(2)[1], lambda y: torch.cat([y, y])),  # one of two guidance copies
    ],
    ids=["side by side", "tokens first", "one copy"],
)
def test_rows_in_other_shapes_are_told_apart(into, back):
    layer = nn.Linear(6, 4)
    site, factors, signs, weights = build(layer)
    x = torch.randn(4, 2, 5, 6)
    toy = Reshaped(layer, into, back)
    with PopulationForward(toy, [site], SIGMA).members(factors, signs, rows=2):
        fused = toy(torch.cat([x.flatten(0, 1)] * 2))
    expected = merged_outputs(layer, weights, x).flatten(0, 1)
    torch.testing.assert_close(fused, torch.cat([expected] * 2))


def test_all_tokens_in_one_row_are_an_error_rather_than_wrong_pictures():
    toy = Reshaped(nn.Linear(6, 4), lambda x: x.flatten(0, 1)[None], lambda y: y)
    site, factors, signs, _ = build(toy.layer)
    with PopulationForward(toy, [site], SIGMA).members(factors, signs, rows=1):
        with pytest.raises(PopulationShapeError, match="sees 1 rows while the denoiser was called with 4"):
            toy(torch.randn(4, 5, 6))


# --- many layers ---


class Products(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("at_once", [2**22, 4 * 24 * 3], ids=["all at once", "three at once"])
@pytest.mark.parametrize("kind", ["plain", "left", "additive"])
def test_the_matrices_of_all_layers_of_one_shape_are_made_in_one_product(monkeypatch, kind, at_once):
    """On a GPU a small product costs its launch: a layer of many has one left, for what it computes with them."""
    monkeypatch.setattr("es_trl.es.population.AT_ONCE", at_once)
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4, bias=False) for _ in range(6)] + [nn.Linear(4, 6, bias=False)]
    built = [build(layer, left=kind == "left", additive=kind == "additive") for layer in layers]
    sites = [site for site, *_ in built]
    for number, site in enumerate(sites):
        site.name = f"layer {number}"
    factors = {site.name: next(iter(own.values())) for site, (_, own, _, _) in zip(sites, built, strict=True)}
    toy, x = Toy(nn.Sequential(*layers[:1])), torch.randn(4, 5, 6)
    with Products() as made, PopulationForward(toy, sites, SIGMA).members(factors, built[0][2], rows=1):
        drawn = toy(x)
    shapes = 3 if at_once < 2**22 else 2
    assert made.names.count("baddbmm") == (0 if kind == "additive" else shapes)
    assert made.names.count("stack") == {"plain": 3, "left": 4, "additive": 2}[kind] * shapes
    torch.testing.assert_close(drawn, merged_outputs(layers[0], built[0][3], x[:, None])[:, 0], atol=2e-5, rtol=1e-5)


# --- what is left behind (F28) ---


@torch.no_grad()
def test_the_module_is_itself_again_after_an_exception():
    toy = Toy(nn.Linear(6, 4))
    site, factors, signs, _ = build(toy.layer)
    x = torch.randn(8, 5, 6)
    before = toy(x)
    forward = PopulationForward(toy, [site], SIGMA)
    with pytest.raises(KeyboardInterrupt):
        with forward.members(factors, signs, rows=2):
            toy(x)
            raise KeyboardInterrupt
    assert torch.equal(toy(x), before)
    assert "forward" not in vars(toy.layer) and not toy._forward_pre_hooks


def test_population_contexts_do_not_nest():
    toy = Toy(nn.Linear(6, 4))
    site, factors, signs, _ = build(toy.layer)
    forward = PopulationForward(toy, [site], SIGMA)
    with forward.members(factors, signs, rows=1):
        with pytest.raises(RuntimeError, match="do not nest"):
            with forward.members(factors, signs, rows=1):
                pass
        assert "forward" in vars(toy.layer), "the outer context goes on"
    assert "forward" not in vars(toy.layer)


@torch.no_grad()
def test_two_hundred_cycles_leave_the_weights_bitwise_the_same():
    toy = Toy(nn.Linear(6, 4))
    site, factors, signs, _ = build(toy.layer)
    x = torch.randn(4, 6)
    before, weight, theta = toy(x), toy.layer.weight.clone(), site.theta.clone()
    forward = PopulationForward(toy, [site], SIGMA)
    for _ in range(200):
        with forward.members(factors, signs, rows=1):
            toy(x)
    assert torch.equal(toy.layer.weight, weight) and torch.equal(site.theta, theta)
    assert torch.equal(toy(x), before)


@torch.no_grad()
def test_a_compiled_model_is_traced_once_for_all_populations():
    """New noise must not mean a new trace: after eight of them torch.compile gives up."""
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    toy = Toy(nn.Linear(6, 4))
    site, _, signs, _ = build(toy.layer)
    forward, bank, x = PopulationForward(toy, [site], SIGMA), NoiseBank(1, {site.name: (4, 6)}), torch.randn(4, 5, 6)
    toy.compile(fullgraph=True, backend="eager")
    for step in range(3):
        factors = {site.name: bank.draw(step, range(2))[site.name].select(torch.tensor([0, 0, 1, 1]))}
        with forward.members(factors, signs, rows=1):
            drawn = toy(hidden_states=x)
        weights = site.theta + SIGMA * signs[:, None, None] * factors[site.name].dense()
        torch.testing.assert_close(drawn, merged_outputs(toy.layer, weights, x[:, None])[:, 0])
    assert dynamo.counters["stats"]["unique_graphs"] == 1
