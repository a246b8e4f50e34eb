"""What every test runs under: one thread, no network, no trackers, no Hub."""

import copy
import functools
import gc
import hashlib
import os
from types import SimpleNamespace

import pytest


# Set before torch or any Hugging Face library is imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the numbers in the tests are CPU numbers
for name in ("HF_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(name, None)


# Files of which a few tests take long: they come first, so that no worker of `make test` is left alone with one.
LONG_FILES = ("test_gpu_rehearsal", "test_policy_gradient", "test_trainer_distributed", "test_trainer_training",
              "test_cards", "test_trainer_watch", "test_bases", "test_hub_pushing", "test_ranks", "test_docs",
              "test_methods_contract", "test_trainer_resume", "test_docs_pages", "test_dpo")  # fmt: skip
begun = set()


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    remember_singular_vectors()
    read_what_ships_once()
    find_hooks_quickly()
    leave_garbage_to_python()
    trust_the_disk()


def pytest_runtest_setup(item):
    if item.path not in begun:
        begun.add(item.path)
        hide_what_stays()


def hide_what_stays():
    """
    What has been imported by now stays, out of the collector's sight: 700,000 objects of libraries, through which each
    of its whole rounds would walk.
    """
    gc.collect()
    gc.freeze()


def remember_singular_vectors():
    """
    The shipped model's 40 matrices are decomposed once in a process and not for every trainer: a sixth of a tiny run.
    They are known by their bytes, so that a space is built from what it would be built from.
    """
    import torch

    from es_trl.pipelines import spaces

    decompose, known = spaces._top_singular_vectors, {}

    @functools.wraps(decompose)
    def remembered(W, rank, seed):
        if W.is_meta or min(W.shape) > 512:  # there a seed decides too
            return decompose(W, rank, seed)
        content = W.detach().contiguous().view(torch.uint8).numpy()
        key = hashlib.sha256(content).digest(), tuple(W.shape), W.dtype, rank
        if key not in known:
            known[key] = decompose(W, rank, seed)
        return tuple(part.clone() for part in known[key])

    spaces._top_singular_vectors = remembered


def read_what_ships_once():
    """
    The shipped pipeline and scorers are read from disk once in a process; every other time a copy of them is given
    out, in a third of the time.
    """
    import torch
    from diffusers import DiffusionPipeline

    from es_trl import assets
    from es_trl.rewards import clip_features

    known, pipeline, scorer = {}, DiffusionPipeline.from_pretrained, clip_features._load
    shipped = {assets.resolve(name) for name in ("tiny-sana-sprint", "tiny-pickscore", "tiny-clip-heldout")}

    def copy_of(read, *names, **options):
        key = read, names, tuple(sorted(options.items()))
        if key not in known:
            known[key] = read(*names, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "__deepcopy__", copy_module, raising=False)
            return copy.deepcopy(known[key])

    @functools.wraps(scorer)
    def load_scorer(checkpoint, processor):
        alike = {assets.resolve(checkpoint), assets.resolve(processor)} <= shipped
        return copy_of(scorer, checkpoint, processor) if alike else scorer(checkpoint, processor)

    def load_pipeline(cls, source, **options):
        if cls is DiffusionPipeline and source in shipped and options.keys() == {"use_safetensors", "dtype"}:
            return copy_of(pipeline, source, **options)
        return pipeline.__func__(cls, source, **options)

    clip_features._load = load_scorer
    DiffusionPipeline.from_pretrained = classmethod(functools.wraps(pipeline)(load_pipeline))


def copy_module(module, memo):
    """As `copy.deepcopy` does, in half the time: most of a module are empty dicts of hooks."""
    made = memo[id(module)] = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        empty = isinstance(value, dict) and not value
        made.__dict__[name] = value.copy() if empty else copy.deepcopy(value, memo)
    return made


def find_hooks_quickly():
    """
    diffusers looks at every module of every part for hooks, several times a call: a third of a call of the shipped
    model, most of it torch's generators within generators and the error that every missing attribute costs.
    """
    from diffusers.hooks import group_offloading
    from diffusers.models import modeling_utils

    dtype_of = modeling_utils.get_parameter_dtype

    def hooks_in(module):
        """In torch's order."""
        left, seen = [module], set()
        while left:
            part = left.pop()
            if part is not None and part not in seen:
                seen.add(part)
                if "_diffusers_hook" in part.__dict__:
                    yield part._diffusers_hook
                left.extend(reversed(part._modules.values()))

    class WithoutHooks:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            return getattr(self.module, name)

    def top_hook(module):
        found = (registry.get_hook(group_offloading._GROUP_OFFLOADING) for registry in hooks_in(module))
        return next((hook for hook in found if hook is not None), None)

    def dtype(module):
        return dtype_of(module if any(True for _ in hooks_in(module)) else WithoutHooks(module))

    group_offloading._get_top_level_group_offload_hook = top_hook
    modeling_utils.get_parameter_dtype = dtype


def leave_garbage_to_python():
    """accelerate collects garbage in every run, a sixth of a tiny one's time; Python does when there is enough."""
    from accelerate.utils import memory

    memory.gc = SimpleNamespace(collect=lambda: 0)


def trust_the_disk():
    """What a test writes need not outlive a power cut: milliseconds for each of thousands of files."""
    os.fsync = lambda descriptor: None
