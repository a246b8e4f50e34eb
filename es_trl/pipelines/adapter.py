"""PipelineAdapter: a frozen diffusers pipeline with one LoRA on its denoiser, and the only door to both."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from ..es import Factors, PopulationForward, make_seed
from ..files import LORA_WEIGHTS_NAME
from .base_layers import compute_dtype
from .call_settings import CallSettings
from .digest import tensor_digest
from .frozen import FrozenPipeline
from .loading import lora_parts
from .lora_files import lora_layers
from .lora_loading import Start, activate, carried_adapters, config_of, set_scale, take_off
from .replaced import replaced
from .spaces import build_space
from .targets import coverage, resolve_targets


logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"  # the name under which diffusers collects the metadata of a LoRA


class PipelineAdapter(FrozenPipeline):
    """
    Freezes `pipe`, puts a LoRA on its denoiser and draws with it.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a LoRA loader.
        lora_config (`peft.LoraConfig`, *optional*): Rank, alpha and targets, which may be the words `"attention"` and
            `"feed_forward"`. By default rank 8, alpha = rank, on all attention projections.
        es_space (`str`, *optional*, defaults to `"lora"`): `"lora"`, `"lora_b"`, `"lora_xs"` or `"weight"`.
        settings (`CallSettings`, *optional*): How the pipeline is called.
        seed (`int`, *optional*, defaults to `0`): Seeds the LoRA's random start.
        start (`dict`, *optional*): Factors by layer that training starts from ([`read_start`]), instead of those that
            leave the base as it is; they decide rank and targets.

    Adapters that `pipe` carries stay as they are and belong to the base.

    Attributes:
        theta (`dict[str, nn.Parameter]`): The fp32 adapter matrices that training moves.

    Raises:
        `ValueError`: if the pipeline has no LoRA loader, carries an adapter already, or does not take a setting.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        lora_config: LoraConfig | None = None,
        es_space: str = "lora",
        settings: CallSettings | None = None,
        seed: int = 0,
        start: Start | None = None,
    ):
        super().__init__(pipe, settings)
        self.lora_config = config_of(start) if start else lora_config or LoraConfig(r=8, lora_alpha=8)
        check_lora_config(self.lora_config)
        self.es_space = es_space
        self._name_what_stays()
        self._inject(seed)
        self.space = build_space(es_space, self.denoiser, ADAPTER_NAME, seed)
        self.theta = self.space.theta
        for name, (A, B) in (start or {}).items():
            self.space.start_from(name, A, B)
        self._written: list[float] | None = None
        self._population: PopulationForward | None = None

    def _name_what_stays(self) -> None:
        others = [name for name in lora_parts(self.pipe) if getattr(self.pipe, name) is not self.denoiser]
        if others:
            logger.warning(
                "LoRA goes on the %s alone; the %s of %s stays as it is, in the steps that it draws.",
                self.denoiser_name,
                ", ".join(others),
                type(self.pipe).__name__,
            )

    def _inject(self, seed: int) -> None:
        self.frozen_adapters = carried_adapters(self.denoiser)
        if ADAPTER_NAME in getattr(self.denoiser, "peft_config", {}):
            raise ValueError(
                f"The pipeline's {self.denoiser_name} already carries an adapter called {ADAPTER_NAME!r}, as the "
                "one to be trained is. Load it under another name to keep it, call pipe.unload_lora_weights() to go "
                "without, or start from its file with init_adapter."
            )
        targets = resolve_targets(self.denoiser, self.lora_config.target_modules)
        self.lora_config = replace(self.lora_config, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(make_seed(seed, "lora_start"))
            try:
                if hasattr(self.denoiser, "add_adapter"):  # diffusers' and transformers' own note it down
                    self.denoiser.add_adapter(self.lora_config, ADAPTER_NAME)
                else:
                    inject_adapter_in_model(self.lora_config, self.denoiser, ADAPTER_NAME)
                self._leave_meta()
            except (ValueError, TypeError) as error:  # a TypeError for a quantisation that peft does not know
                raise ValueError(
                    f"LoRA could not be put on the {self.denoiser_name}: {str(error).splitlines()[0]} Set "
                    "lora_target_modules to names of Linear or Conv2d layers of this model."
                ) from error
        self.denoiser.requires_grad_(False)
        logger.info(coverage(self.denoiser, lora_layers(self.denoiser, ADAPTER_NAME)))
        dtype = compute_dtype(self.denoiser)
        for layer in lora_layers(self.denoiser, ADAPTER_NAME).values():
            for module in (layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]):
                module.to(dtype)
        activate(self.denoiser, [*self.frozen_adapters, ADAPTER_NAME])

    def unload(self) -> None:
        """Leaves the pipeline as it was, frozen; this object is of no use after that."""
        take_off(self.pipe, self.denoiser, [ADAPTER_NAME], self.frozen_adapters)

    def _leave_meta(self) -> None:
        """Where the base's weights come to the device for their layer's forward alone, LoRA has to stay there."""
        for layer in lora_layers(self.denoiser, ADAPTER_NAME).values():
            modules = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
            if hasattr(layer.get_base_layer(), "_hf_hook") and any(module.weight.is_meta for module in modules):
                for module in modules:
                    module.to_empty(device=self.pipe._execution_device)
                layer.reset_lora_parameters(ADAPTER_NAME, self.lora_config.init_lora_weights)

    # ---- drawing ----

    @contextmanager
    def members(self, factors: dict[str, Factors], signs: torch.Tensor, sigma: float, rows: int) -> Iterator[None]:
        """Inside, `generate` draws `rows` images for each of `len(signs)` members, member by member."""
        if self._population is None or self._population.sigma != sigma:
            self._population = PopulationForward(self.denoiser, self.space.sites, sigma)
        off = self.adapter_disabled() if self.space.base_only else nullcontext()
        with self._population.members(factors, signs, rows), replaced(self.drawer, members=len(signs)), off:
            yield

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, the frozen base model draws, with the adapters that came with it."""
        activate(self.denoiser, self.frozen_adapters)
        try:
            yield
        finally:
            activate(self.denoiser, [*self.frozen_adapters, ADAPTER_NAME])

    @contextmanager
    def adapter_scale(self, scale: float) -> Iterator[None]:
        """Inside, the adapter's effect is multiplied by `scale` (1 is as trained, 0 is the base)."""
        set_scale(self.denoiser, ADAPTER_NAME, scale)
        try:
            yield
        finally:
            set_scale(self.denoiser, ADAPTER_NAME, 1.0)

    # ---- theta ----

    def write_back(self) -> None:
        """Brings the pipeline's LoRA weights up to date with theta; does nothing when theta has not changed."""
        # Looks at the values, because fused optimizers do not count up a tensor's version.
        theta = [parameter.detach() for parameter in self.theta.values()]
        state = torch.stack([*torch._foreach_norm(theta), *(value.sum() for value in theta)]).tolist()
        if state != self._written:
            self.space.write_back()
            self._written = state

    def to(self, device: torch.device | str, encoders_first: torch.device | str | None = None) -> Self:
        """As [`FrozenPipeline.to`], with theta and its constants."""
        self.space.to(torch.device(device))
        return super().to(device, encoders_first)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Theta and the constants it needs, fp32: enough to continue bit by bit on the same frozen model."""
        tensors = {f"theta.{name}": parameter.detach() for name, parameter in self.theta.items()}
        return tensors | {f"constant.{name}": value for name, value in self.space.constants().items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` if names or shapes are not this adapter's."""
        own = self.state_dict()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise ValueError(
                f"The saved adapter does not fit this one ({len(odd)} names differ, the first is {odd[0]}): "
                "es_space, lora_target_modules and the base model must be those of the saved run."
            )
        for name, value in own.items():
            if value.shape != tensors[name].shape:
                raise ValueError(
                    f"The saved adapter does not fit this one: {name} is {tuple(tensors[name].shape)} there and "
                    f"{tuple(value.shape)} here; lora_rank and the base model must be those of the saved run."
                )
        for name, value in own.items():
            value.copy_(tensors[name])

    # ---- files ----

    def lora_state_dict(self) -> dict[str, torch.Tensor]:
        """The LoRA in peft's names, fp32 whatever the pipeline's dtype, its scale alpha / rank folded into B."""
        names = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER_NAME)
        tensors = {}
        for layer_name, layer in self.space.layers.items():
            A, B = self.space.export(layer_name, layer)
            for part, factor in ("A", A), ("B", B * self.space.scaling[layer_name]):
                key = f"{layer_name}.lora_{part}.weight"
                tensors[key] = factor.detach().float().view_as(names[key]).cpu().contiguous()
        assert tensors.keys() == names.keys()
        return tensors

    def lora_digest(self) -> str:
        """sha256 of the tensors that [`save_lora`] writes; the digest of the file it has written."""
        return tensor_digest({f"{self.denoiser_name}.{name}": value for name, value in self.lora_state_dict().items()})

    def save_lora(self, directory: str | os.PathLike[str]) -> None:
        """
        Writes `pytorch_lora_weights.safetensors` with a scale of 1, alpha being the rank, so that loaders that read
        alpha and those that do not apply the same strength: the same bytes for the same weights, in every process.
        """
        name = self.denoiser_name
        config = self.denoiser.peft_config[ADAPTER_NAME]
        scale_one = {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
        metadata = config.to_dict() | scale_one
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
        parts = {f"{name}_lora_layers": self.lora_state_dict(), f"{name}_lora_adapter_metadata": metadata}
        self.pipe.save_lora_weights(save_directory=directory, safe_serialization=True, **parts)
        sort_metadata(os.path.join(directory, LORA_WEIGHTS_NAME))

    def describe(self) -> dict[str, Any]:
        """How images were drawn and what was trained, as plain data for cards and evaluation files."""
        config, targets = self.lora_config, self.lora_config.target_modules
        return super().describe() | {
            "es_space": self.es_space,
            "lora_rank": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
        }


def sort_metadata(path: str | os.PathLike[str]) -> None:
    """Orders the header's metadata, which safetensors writes in the order of a hash table seeded anew each time."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def check_lora_config(config: LoraConfig) -> None:
    """Raises `ValueError` for LoRA variants whose noise or export would not be what the config says."""
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout must be 0 for evolution strategies, got {config.lora_dropout}: members are compared under "
            "common random numbers, and dropout would add noise of its own."
        )
    for field, allowed in (("bias", "none"), ("use_dora", False), ("lora_bias", False), ("modules_to_save", None)):
        if getattr(config, field) not in (allowed, []):
            raise ValueError(f"peft_config.{field} must be {allowed!r}, got {getattr(config, field)!r}.")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"peft_config.init_lora_weights={config.init_lora_weights!r} changes the frozen weights, so the adapter "
            "would not fit the model it is loaded on; use True."
        )
