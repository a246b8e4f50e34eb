"""What every stage shares: settings, data stream, EMA, learning-rate shape and a checkpoint that can be killed."""

import argparse
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import SIZES
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from world import SIZE, Scene, sample_batch


RUNS = Path(os.environ.get("TINY_RUNS", "/tmp/tiny_runs"))
logger = logging.getLogger("tiny_sana")


def setup(seed: int, threads: int = 1, device: str = "cpu") -> None:
    """One thread, no denormals; on the CPU the math attention kernel (flash is slower for sequences this short)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.backends.cuda.enable_flash_sdp(device != "cpu")
    torch.manual_seed(seed)


def parser(description: str, steps: int, batch_size: int, seed: int) -> argparse.ArgumentParser:
    """The arguments of every training stage."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=RUNS, help="folder of checkpoints (or the variable TINY_RUNS)")
    p.add_argument("--steps", type=int, default=steps, help="optimisation steps")
    p.add_argument("--batch-size", type=int, default=batch_size, help="pictures a step")
    p.add_argument("--seed", type=int, default=seed, help="seed of the data and of the weights")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    return p


def pipeline_parser(description: str, steps: int, batch_size: int, seed: int) -> argparse.ArgumentParser:
    """The arguments of the stages that make the pipeline: those of all, and what a larger one on a card needs."""
    p = parser(description, steps, batch_size, seed)
    p.add_argument("--size", choices=SIZES, default="6m", help="of the pipeline, see models.py")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model is trained")
    p.add_argument("--workers", type=int, default=0, help="processes that draw pictures ahead of the training")
    p.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; the next start goes on")
    return p


def to_tensor(pictures: np.ndarray, device: str | torch.device = "cpu") -> torch.Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in -1..1, on the device."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """float (n, 3, h, w) in -1..1 -> uint8 (n, h, w, 3)."""
    return pictures.float().add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


@dataclass
class _Numbered:
    draw: Callable[[int], Any]

    def __getitem__(self, number: int) -> Any:
        return self.draw(number)


def _as_it_is(drawn: Any) -> Any:
    return drawn


def drawn_ahead(draw: Callable[[int], Any], numbers: Sequence[int], workers: int) -> Iterable:
    """draw(k) for every number k, in order. Each of `workers` processes draws up to two ahead; 0: none are."""
    # A generator of its own: the loader takes its seed from the common one, which the training draws from.
    return DataLoader(
        _Numbered(draw), batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_as_it_is,
        generator=torch.Generator(),
    )  # fmt: skip


def stream(
    seed: int, start: int, stop: int, n: int, side: int = SIZE, device: str = "cpu", workers: int = 0
) -> Iterator[tuple[int, torch.Tensor, list[Scene]]]:
    """Training batches start..stop-1: (step, pictures (n, 3, side, side) in -1..1, scenes); k always the same."""
    steps = range(start, stop)
    batches = drawn_ahead(partial(sample_batch, seed, n=n, side=side), steps, workers)
    for step, (pictures, scenes) in zip(steps, batches, strict=True):
        yield step, to_tensor(pictures, device), scenes


def generator_on(device: str, rng: torch.Generator) -> torch.Generator:
    """`rng` itself on the CPU; elsewhere one of that device with its seed: noise is made where it is used."""
    return rng if device == "cpu" else torch.Generator(device).manual_seed(rng.initial_seed())


def learning_rate(step: int, steps: int, peak: float, warmup: int, flat: float) -> float:
    """Linear warm-up, constant until the fraction `flat` of the run, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step / steps - flat) / (1 - flat)
    return peak * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0)))


class EMA:
    """Exponential moving average of the parameters of a module, warmed up so that early steps do not linger."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.module = decay, module
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows, values = list(self.shadow.values()), [p.detach() for p in self.module.parameters()]
        torch._foreach_lerp_(shadows, values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name])


class Checkpoint:
    """Weights, optimizer and EMA of a stage in one safetensors file; written beside and renamed: never half."""

    def __init__(
        self, path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None = None,
        seconds: float = math.inf,
    ):  # fmt: skip
        self.path, self.module, self.optimizer, self.ema, self.limit = path, module, optimizer, ema, seconds
        self.every, self._last, self._spent, self._begin = 90.0, time.monotonic(), 0.0, time.monotonic()

    def load(self) -> int:
        """Restore the newest state and return the number of finished steps, 0 when there is none."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            self._spent = float(file.metadata()["seconds"])
            self.module.load_state_dict({k: file.get_tensor("model." + k) for k in self.module.state_dict()})
            for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
                if f"optimizer.{i}.step" in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    state = {k: file.get_tensor(f"optimizer.{i}.{k}") for k in keys}
                    # Moments in the memory format of the weight, or every step converts them.
                    moments = {k: torch.empty_like(p).copy_(state[k]) for k in keys[1:]}
                    self.optimizer.state[p] = {"step": state["step"], **moments}
            if self.ema is not None:
                self.ema.shadow = {k: file.get_tensor("ema." + k).to(v.device) for k, v in self.ema.shadow.items()}
            logger.info("resumed %s at step %s", self.path, file.metadata()["step"])
            return int(file.metadata()["step"])

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent in this stage over all its runs."""
        return self._spent + time.monotonic() - self._begin

    def save(self, step: int) -> None:
        tensors = {"model." + k: v.detach().clone() for k, v in self.module.state_dict().items()}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            tensors |= {f"optimizer.{i}.{k}": v.clone() for k, v in self.optimizer.state.get(p, {}).items()}
        if self.ema is not None:
            tensors |= {"ema." + k: v.clone() for k, v in self.ema.shadow.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, beside, {"step": str(step), "seconds": f"{self.seconds:.1f}"})
        beside.replace(self.path)
        self._last = time.monotonic()

    def maybe_save(self, step: int) -> bool:
        """Save when the last save is 90 seconds old, and when this start has had its time: then True."""
        now = time.monotonic()
        over = now - self._begin > self.limit
        if over or now - self._last > self.every:
            self.save(step)
        return over


def finished_steps(path: Path) -> int:
    """Of the stage that writes this checkpoint; 0 when there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def load_weights(path: Path, module: torch.nn.Module, ema: bool = True) -> None:
    """Load the (averaged) weights of a finished stage into a module."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        prefix = {k: "ema." if ema and "ema." + k in names else "model." for k in module.state_dict()}
        module.load_state_dict({k: file.get_tensor(prefix[k] + k) for k in module.state_dict()})


def cycle_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
