"""Search spaces: which matrices theta evolution strategies move, and the LoRA weights that theta stands for.

Every space exports an ordinary LoRA, so what was trained loads with `pipe.load_lora_weights`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..es import Site, make_seed
from .base_layers import dense_weight
from .lora_files import lora_layers


class SearchSpace(ABC):
    """
    The adapter matrices theta of one denoiser.

    Attributes:
        theta (`dict[str, nn.Parameter]`): fp32 masters by site name; the optimizer steps these.
        sites (`list[Site]`): Where a member's weights enter the forward pass.
        scaling (`dict[str, float]`): alpha / rank by layer.
        base_only (`bool`): Whether members run with the LoRA branch switched off (space `weight`).
    """

    base_only = False

    def __init__(self, layers: dict[str, LoraLayer], adapter_name: str, seed: int):
        self.layers, self.adapter_name, self.seed = layers, adapter_name, seed
        # Kept from the start: `adapter_scale` changes the layers' own for a while.
        self.scaling = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
        self.sites: list[Site] = []
        self.kept: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            self.build(name, layer)
        self.theta: dict[str, nn.Parameter] = {site.name: site.theta for site in self.sites}

    @abstractmethod
    def build(self, name: str, layer: LoraLayer) -> None:
        """Adds the sites of one LoRA layer."""

    @abstractmethod
    def export(self, name: str, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 LoRA factors `A (r, n)` and `B (m, r)` of one layer."""

    @torch.no_grad()
    def start_from(self, name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """
        Sets theta of layer `name` to the LoRA `B A` instead of one that leaves the base as it is.

        Raises:
            `ValueError`: if the space does not hold it.
        """
        for part, factor in zip("AB", (A, B), strict=True):
            (self.theta | self.constants())[f"{name}.lora_{part}"].copy_(factor.flatten(1))

    def constants(self) -> dict[str, torch.Tensor]:
        """Tensors that are neither theta nor part of the frozen model, but that theta needs to mean anything."""
        return self.kept

    def report(self) -> dict[str, float]:
        """What a reader of the export should know about it."""
        return {}

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the exported factors into the pipeline's own LoRA modules, in their dtype."""
        for name, layer in self.layers.items():
            A, B = self.export(name, layer)
            for module, factor in zip(self.modules(layer), (A, B), strict=True):
                module.weight.copy_(factor.view_as(module.weight))

    def modules(self, layer: LoraLayer) -> tuple[nn.Module, nn.Module]:
        """The pipeline's own modules of the factors A and B of `layer`."""
        return layer.lora_A[self.adapter_name], layer.lora_B[self.adapter_name]

    def to(self, device: torch.device) -> None:
        """Moves theta and the constants, keeping the Parameters that an optimizer may hold."""
        for site in self.sites:
            site.theta.data = site.theta.data.to(device)
        for constant in self.constants().values():
            constant.data = constant.data.to(device)


class LoraSpace(SearchSpace):
    """Both LoRA factors. At the start `B = 0`, so only perturbations of `B` have a first-order effect."""

    moved = "AB"

    def build(self, name: str, layer: LoraLayer) -> None:
        for part, module in zip("AB", self.modules(layer), strict=True):
            weight, key = module.weight.detach().float().flatten(1), f"{name}.lora_{part}"
            if part in self.moved:
                self.sites.append(Site(key, module, nn.Parameter(weight.clone(), requires_grad=True)))
            else:
                self.kept[key] = weight

    def export(self, name: str, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        A = (self.theta if "A" in self.moved else self.kept)[f"{name}.lora_A"]
        return A, self.theta[f"{name}.lora_B"]


class LoraBSpace(LoraSpace):
    """Only the LoRA factor `B`; `A` keeps its random start. Half the dimensions of `lora`, none of them idle."""

    moved = "B"


class LoraXSSpace(SearchSpace):
    """
    An `r x r` core between the frozen weight's top singular vectors (LoRA-XS, arXiv 2405.17604):
    `dW = (U sqrt(S)) R (sqrt(S) V^T)`, exported as `B = U sqrt(S) R`, `A = sqrt(S) V^T`.
    """

    def build(self, name: str, layer: LoraLayer) -> None:
        lora_A, lora_B = self.modules(layer)
        rank = lora_B.weight.shape[1]
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) or lora_A.weight.shape[1] != base.in_features:
            raise ValueError(f'es_space="lora_xs" works on Linear layers only, {name} is not one; use "lora".')
        _check_rank(rank, name, base)
        W = dense_weight(base, lora_A.weight.dtype)
        U, S, V = _top_singular_vectors(W, rank, make_seed(self.seed, "singular_vectors", len(self.sites)))
        self.kept[f"{name}.lora_A"] = (V * S.sqrt()).T.contiguous()
        left = self.kept[f"{name}.left"] = (U * S.sqrt()).contiguous()
        core = nn.Parameter(torch.zeros(rank, rank, device=W.device), requires_grad=True)
        self.sites.append(Site(f"{name}.core", lora_B, core, left=left))

    def export(self, name: str, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kept[f"{name}.lora_A"], self.kept[f"{name}.left"] @ self.theta[f"{name}.core"]

    @torch.no_grad()
    def start_from(self, name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        left, right = self.kept[f"{name}.left"], self.kept[f"{name}.lora_A"]
        core = torch.linalg.pinv(left) @ B @ A @ torch.linalg.pinv(right)
        left_out = torch.linalg.matrix_norm(B @ A - left @ core @ right)
        if left_out > 0.01 * torch.linalg.matrix_norm(B @ A):
            raise ValueError(
                f"init_adapter: the LoRA on {name} is no combination of the base's top singular vectors, which "
                "is what es_space='lora_xs' trains (a run in it with this seed wrote no such file). Take es_space "
                "'lora', 'lora_b' or 'weight', or give the LoRA in frozen_adapters to train another beside it."
            )
        self.theta[f"{name}.core"].copy_(core)


class WeightSpace(SearchSpace):
    """
    The frozen matrices themselves, as in the EGGROLL paper. The sum of updates stays in fp32 beside the frozen weight;
    the export is its best rank-`lora_rank` approximation, and `energy_kept` says what share of it that keeps.
    """

    base_only = True

    def build(self, name: str, layer: LoraLayer) -> None:
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise ValueError(f'es_space="weight" works on Linear layers only, {name} is {type(base).__name__}.')
        lora_B = self.modules(layer)[1].weight
        _check_rank(lora_B.shape[1], name, base)
        shape = base.out_features, base.in_features  # a packed weight has another
        theta = nn.Parameter(torch.zeros(shape, device=lora_B.device), requires_grad=True)
        self.sites.append(Site(f"{name}.weight", base, theta, additive=True))

    def export(self, name: str, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        dW = self.theta[f"{name}.weight"].detach()
        rank = self.modules(layer)[1].weight.shape[1]
        if not dW.any():
            return dW.new_zeros(rank, dW.shape[1]), dW.new_zeros(dW.shape[0], rank)
        U, S, V = _top_singular_vectors(dW, rank, make_seed(self.seed, "export"))
        root = (S / self.scaling[name]).sqrt()
        return (V * root).T, U * root

    def start_from(self, name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        self.theta[f"{name}.weight"].detach().copy_(B @ A)

    def report(self) -> dict[str, float]:
        return {"energy_kept": self.energy_kept()}

    @torch.no_grad()
    def energy_kept(self) -> float:
        """Share of the squared Frobenius norm of all updates that the exported LoRA keeps, in [0, 1]."""
        total = kept = 0.0
        for name, layer in self.layers.items():
            A, B = self.export(name, layer)
            kept += float((self.scaling[name] * B @ A).square().sum())
            total += float(self.theta[f"{name}.weight"].detach().square().sum())
        return kept / total if total else 1.0


SPACES: dict[str, Callable[..., SearchSpace]] = {
    "lora": LoraSpace,
    "lora_b": LoraBSpace,
    "lora_xs": LoraXSSpace,
    "weight": WeightSpace,
}


def build_space(kind: str, denoiser: nn.Module, adapter_name: str, seed: int) -> SearchSpace:
    """The search space over all LoRA layers of `denoiser`. Raises `ValueError` for an unknown `es_space`."""
    if kind not in SPACES:
        raise ValueError(f"es_space must be one of {', '.join(SPACES)}; got {kind!r}.")
    return SPACES[kind](lora_layers(denoiser, adapter_name), adapter_name, seed)


def _check_rank(rank: int, name: str, layer: nn.Linear) -> None:
    shape = layer.out_features, layer.in_features
    if rank > min(shape):
        raise ValueError(f"lora_rank {rank} exceeds the smaller side of {name} {shape}; lower lora_rank.")


def _top_singular_vectors(W: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`U (m, r)`, `S (r,)`, `V (n, r)`; randomised above 512 rows, where a full decomposition takes seconds."""
    if W.is_meta:  # there is nothing to decompose, and only shapes are asked for
        return W.new_empty(W.shape[0], rank), W.new_empty(rank), W.new_empty(W.shape[1], rank)
    if min(W.shape) <= 512:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].T
    with torch.random.fork_rng([W.device] if W.device.type == "cuda" else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=min(rank + 16, *W.shape), niter=6)
    return U[:, :rank], S[:rank], V[:, :rank]
