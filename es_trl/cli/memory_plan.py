"""What a config would take of a GPU's memory, moment by moment: from shapes alone, before anything is downloaded."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from torch import nn

from ..es import Factors, NoiseBank, make_generator
from ..pipelines import (
    ENCODED_AT_ONCE,
    CallSettings,
    DifferentiableForward,
    LiveBytes,
    PipelineAdapter,
    empty_pipeline,
    equal_blocks_once,
    no_starting_values,
    set_up,
    shorten,
    standing,
    tensors_of,
)
from ..trainer import DiffusionConfig, ESConfig
from .arguments import RunArguments
from .scorer_memory import checkpoint_of, scorer_memory


GB = 1e9
FROZEN_RANK = 64  # of a LoRA that stays on the model and has not been read
PROMPT = "a photograph of a small red fox and a large blue bird who sit beside each other on an old wooden fence"
# Bytes that a weight takes, by a quantisation's backend and arguments; nf4 has a scale for every 64 weights.
STORED: dict[str, Callable[[dict], float]] = {
    "bitsandbytes_4bit": lambda given: 0.5 + (1 / 64 if given.get("bnb_4bit_use_double_quant") else 4 / 64),
    "bitsandbytes_8bit": lambda given: 1.0,
    "torchao": lambda given: 0.52 if "Int4" in str(given.get("quant_type")) else 1.0,
    "quanto": lambda given: {"int4": 0.5, "int2": 0.25}.get(given.get("weights_dtype", "int8"), 1.0),
}


@dataclass
class Moment:
    """What is in memory at one moment of a run, in GB by what it is."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """GB in all."""
        return sum(self.parts.values())


@dataclass
class MemoryPlan:
    """The moments of a run, where the shapes are from, and what could not be counted."""

    moments: list[Moment]
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.total)


class _Stop(Exception):
    """Far enough."""


def plan_memory(arguments: RunArguments, config: DiffusionConfig) -> MemoryPlan:
    """
    The memory that a run, as [`parse`] returns it, needs at its moments, counted on tensors without numbers.

    Raises:
        `ValueError`: if the model's configuration cannot be had, or does not fit the settings.
    """
    run = _Run(arguments, config)
    weights = run.weights()
    denoiser, encoders = weights.pop("denoiser"), {"text encoders": weights.pop("text encoders")}
    scorers, scoring, notes = run.scorers()
    others = weights | scorers
    resident = {"denoiser": denoiser, **others, **run.trained()}
    if not config.release_text_encoder:
        resident |= encoders
    images, drawing = run.drawing()
    moments = []
    if not (config.release_text_encoder and (config.text_encoder_device or "").startswith("cpu")):
        packed = "bitsandbytes" in config.mapping("quantization_config").get("quant_backend", "")
        early = {"denoiser": denoiser} if packed and run.stored(run.adapter.denoiser_name) is not None else {}
        before = others | early  # bitsandbytes has it on the GPU as soon as it is loaded
        before = before if config.release_text_encoder else resident
        moments.append(Moment("encoding prompts", before | encoders | {"activations": drawing["encode"]}))
    for phase, name in (("denoise", "denoising"), ("decode", "decoding")):
        moments.append(Moment(f"{name} {images} images", resident | {"activations": drawing[phase]}))
    if scoring:
        moments.append(Moment("scoring", resident | {"activations": scoring}))
    if not isinstance(config, ESConfig):
        moments.append(Moment(f"backward of {run.per_backward} images", resident | {"activations": run.backward()}))
    if arguments.judge and arguments.test_dataset_name and not run.scored_elsewhere:
        judge = scorer_memory(checkpoint_of(arguments.judge) or "", config.reward_dtype)
        drawn = max(moments[-3:], key=lambda moment: moment.total).parts
        moments.append(Moment("comparison at the end", drawn | ({"judge": judge[0]} if judge else {})))
    return MemoryPlan(moments, run.source, notes)


class _Run:
    """A config's pipeline with its adapter, without numbers, its long rows of blocks shortened."""

    def __init__(self, arguments: RunArguments, config: DiffusionConfig):
        self.arguments, self.config, self.dtype = arguments, config, getattr(torch, config.dtype)
        empty, self.source, self.stands = _empty(
            arguments.model_name_or_path, self.dtype, json.dumps(config.model_init_kwargs or {}, default=str)
        )
        self.pipe = copy.copy(empty)
        for name, part in empty.components.items():  # LoRA and switches go on copies
            if isinstance(part, nn.Module) and not name.startswith("text_encoder"):
                vars(self.pipe)[name] = _copied(part, {})
        set_up(self.pipe, config.mapping("scheduler_config"), config.vae_slicing, config.vae_tiling)
        names = [f.name for f in dataclasses.fields(CallSettings) if f.name != "extra"]
        settings = CallSettings(**{n: getattr(config, n) for n in names}, extra=config.mapping("pipeline_kwargs"))
        alpha = config.lora_alpha or config.lora_rank
        lora = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=config.lora_target_modules)
        with no_starting_values():
            self.adapter = PipelineAdapter(self.pipe, lora, config.es_space, settings)
        self.adapter.denoiser.to("meta")
        self.adapter.space.to(torch.device("meta"))
        shapes = {site.name: tuple(site.theta.shape) for site in self.adapter.space.sites}
        self.noise = NoiseBank(0, shapes, getattr(config, "noise_rank", 1))
        self.scored_elsewhere = (config.reward_device or "").startswith("cpu")
        self.per_backward = getattr(config, "images_per_backward", 0)

    # ---- what stays ----

    def weights(self) -> dict[str, float]:
        """GB of the pipeline's parts as they are stored."""
        found = {"denoiser": 0.0, "text encoders": 0.0, "autoencoder and others": 0.0}
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                kind = "denoiser" if part is self.adapter.denoiser else "autoencoder and others"
                kind = "text encoders" if name.startswith("text_encoder") else kind
                stands = self.stands if kind == "denoiser" else {}
                found[kind] += _bytes(part, self.dtype, stands, self.stored(name)) / GB
        if self.config.frozen_adapters:
            layers = [(n, m) for n, m in self.adapter.denoiser.named_modules() if isinstance(m, nn.Linear)]
            layers = [(n, m) for n, m in layers if ".lora_" not in n and min(m.weight.shape) > FROZEN_RANK]
            sides = sum((m.in_features + m.out_features) * standing(n, self.stands) for n, m in layers)
            size = len(self.config.frozen_adapters) * FROZEN_RANK * sides * self.dtype.itemsize
            found["frozen LoRA, if of rank 64 on all layers"] = size / GB
        return found

    def stored(self, name: str) -> float | None:
        """Bytes per weight of the Linear layers of a part, if it is quantised."""
        wanted = self.config.mapping("quantization_config")
        parts = wanted.get("components_to_quantize") or [self.adapter.denoiser_name]
        if not wanted or name not in ([parts] if isinstance(parts, str) else parts):
            return None
        return STORED.get(wanted["quant_backend"], lambda given: 1.0)(wanted.get("quant_kwargs") or {})

    def trained(self) -> dict[str, float]:
        """GB of theta with what its optimizer keeps, of its constants, and of the noise of members drawn at once."""
        theta = _numbers(self.adapter.theta, self.stands) * 4 / GB
        constants = _numbers(self.adapter.space.constants(), self.stands) * 4 / GB
        if not isinstance(self.config, ESConfig):  # gradient, its sum, two moments, the theta before
            return {"adapter and optimizer": 6 * theta + constants}
        sides = {name: torch.empty(m + n, device="meta") for name, (m, n) in self.noise.shapes.items()}
        members = min(self.config.members_per_forward, self.config.population_size)
        noise = members * self.noise.rank * _numbers(sides, self.stands) * 4 / GB
        return {"adapter and optimizer": 4 * theta + constants, "noise of its members": noise}

    def scorers(self) -> tuple[dict[str, float], float, list[str]]:
        """GB of the rewards' models, GB of one of their passes, and what is not known of them."""
        more = ("eval_reward_funcs", "guard_reward_funcs", "slope_reward_funcs")
        specs = [*self.arguments.reward_funcs, *(s for n in more for s in getattr(self.config, n, None) or ())]
        names = {} if self.scored_elsewhere else {checkpoint_of(spec): spec for spec in specs if isinstance(spec, str)}
        names.pop(None, None)
        found = {name: scorer_memory(name, self.config.reward_dtype) for name in names}
        notes = [f"the reward {names[n]} is not counted: its shape is not known here" for n in names if not found[n]]
        known = [value for value in found.values() if value]
        weights = {"rewards": sum(size for size, _ in known)} if known else {}
        return weights, max((peak for _, peak in known), default=0.0), notes

    # ---- what comes and goes ----

    def drawing(self) -> tuple[int, dict[str, float]]:
        """How many images are drawn at once at most, and GB by the phase of that call."""
        config, members = self.config, 1
        images = getattr(config, "images_per_forward", 0)
        if isinstance(config, ESConfig):
            members = min(config.members_per_forward, config.population_size)
            images = members * config.images_per_member
        evaluates = config.eval_strategy != "no" or config.eval_on_start or self.arguments.test_dataset_name
        looks = config.num_sample_prompts if config.sample_steps else 0
        others = config.per_device_eval_batch_size if evaluates else min(looks, config.per_device_eval_batch_size)
        if others > images:
            images, members = others, 1
        return images, self._draw(images, members)[0]

    def _draw(self, images: int, members: int = 1, up_to_denoiser: bool = False) -> tuple[dict[str, float], tuple]:
        """GB by phase of drawing `images`, and what the denoiser was called with."""
        live, found = LiveBytes(), dict.fromkeys(("encode", "denoise", "decode"), 0.0)
        calls: list[tuple] = []

        def into(phase: str) -> None:
            found[phase] = max(found[phase], live.peak / GB)
            live.begin()

        def before(_module, args, kwargs):
            into("denoise" if calls else "encode")
            calls.append((args, kwargs))
            if up_to_denoiser:
                raise _Stop

        settings = self.adapter.settings
        kwargs = settings.call_kwargs(self.pipe, num_inference_steps=1, rows=images)
        kwargs |= self.adapter.prompts.rows([PROMPT] * images)
        kwargs["generator"] = [make_generator(0, "memory_plan", i) for i in range(images)]
        perturbed = self._members(members, images // members) if isinstance(self.config, ESConfig) else nullcontext()
        models = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        denoiser = self.adapter.denoiser
        with torch.no_grad(), live, perturbed, denoiser.register_forward_pre_hook(before, with_kwargs=True):
            with _decoding(self.pipe, lambda: into("denoise")), equal_blocks_once(live, models), suppress(_Stop):
                type(self.pipe).__call__(self.pipe, **kwargs, output_type="pt")
        into("decode")
        found["encode"] *= ENCODED_AT_ONCE / images
        found["denoise"] += self._unpacked()
        return found, calls[0]

    @contextmanager
    def _members(self, members: int, rows: int) -> Iterator[None]:
        factors = {
            name: Factors(*(torch.empty(members, side, self.noise.rank, device="meta") for side in sides))
            for name, sides in self.noise.shapes.items()
        }
        with self.adapter.members(factors, torch.ones(members), 0.1, rows):
            yield

    def _unpacked(self) -> float:
        """GB of the largest layer of a quantised denoiser, which is written out as it is used."""
        if self.stored(self.adapter.denoiser_name) is None:
            return 0.0
        layers = [module for module in self.adapter.denoiser.modules() if isinstance(module, nn.Linear)]
        return max(layer.weight.numel() for layer in layers) * self.dtype.itemsize / GB

    def backward(self) -> float:
        """GB of the activations of a backward pass: those of the shortened model, and what its other blocks keep."""
        _, (args, kwargs) = self._draw(self.per_backward, up_to_denoiser=True)
        denoiser, live = self.adapter.denoiser, LiveBytes()
        kept: dict[str, float] = {}
        ends: dict[str, float] = {}
        if self.config.checkpoint_activations:
            denoiser.enable_gradient_checkpointing()
        for parameter in self.adapter.theta.values():
            parameter.grad = torch.empty_like(parameter)  # it is counted with the adapter
        blocks = {name: denoiser.get_submodule(name) for name in self.stands}
        for name, block in blocks.items():
            block.register_forward_pre_hook(lambda *_, name=name: kept.setdefault(name, live.live) and None)
        with live, torch.enable_grad(), DifferentiableForward(self.adapter).enabled():
            for name, block in blocks.items():  # after those that look at the activations
                block.register_forward_hook(lambda *_, name=name: ends.setdefault(name, live.live) and None)
            output = denoiser(*args, **kwargs)
            sum(tensor.float().square().mean() for tensor in tensors_of(output)).backward()
        more = sum((standing(n, self.stands) - 1) * (ends[n] - kept[n]) for n in self.stands)
        return (live.peak + more) / GB + self._unpacked()


@functools.lru_cache(maxsize=16)
def _empty(model: str, dtype: torch.dtype, options: str):
    """The pipeline without numbers, where its shapes are from, and how often a block of its denoiser stands."""
    pipe, source = empty_pipeline(model, dtype, **json.loads(options))
    name = next(n for n in pipe._lora_loadable_modules if isinstance(getattr(pipe, n, None), nn.Module))
    vars(pipe)[name] = denoiser = _copied(getattr(pipe, name), {})
    return pipe, source, shorten(denoiser)


def _copied(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """A new tree of modules around the same weights, there for their shapes; ten times faster than a copy."""
    if module not in known:
        made = known[module] = copy.copy(module)
        for name, value in vars(module).items():
            if type(value) is dict or type(value).__module__ == type(module).__module__:  # or a table of its positions
                vars(made)[name] = copy.copy(value)
        vars(made)["_modules"] = {name: part and _copied(part, known) for name, part in module._modules.items()}
    return known[module]


@contextmanager
def _decoding(pipe, before: Callable[[], None]) -> Iterator[None]:
    """Inside, `before` is called when the autoencoder decodes; one of several equal slices or tiles speaks for all."""
    vae = next(getattr(pipe, name) for name in ("vae", "movq") if hasattr(pipe, name))
    own, decoder, found = vae.decode, vae.decoder.forward, {}

    def decode(*args, **kwargs):
        before()
        return own(*args, **kwargs)

    def decode_part(latents, *args, **kwargs):
        if latents.shape not in found:
            out = decoder(latents, *args, **kwargs)
            found[latents.shape] = out.shape
            return out
        return latents.new_empty(found[latents.shape])

    vae.decode, vae.decoder.forward = decode, decode_part
    try:
        yield
    finally:
        del vae.decode, vae.decoder.forward


def _numbers(tensors: dict[str, torch.Tensor], stands: dict[str, int]) -> int:
    return sum(value.numel() * standing(name, stands) for name, value in tensors.items())


def _bytes(module: nn.Module, dtype: torch.dtype, stands: dict[str, int], stored: float | None = None) -> float:
    """Of a module's weights in `dtype`; with `stored`, its Linear layers take that many bytes a weight."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    tensors = {name: value for name, value in tensors.items() if ".lora_" not in name}
    linear = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    packed = {} if stored is None else {name: value for name, value in tensors.items() if name in linear}
    others = _numbers(tensors, stands) - _numbers(packed, stands)
    return _numbers(packed, stands) * (stored or 0.0) + others * dtype.itemsize
