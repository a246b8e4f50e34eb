"""What every test runs under: one thread, no network, no trackers, no Hub."""

import gc
import os


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


def pytest_collection_finish():
    """
    What has been imported by now stays. Out of the collector's sight, because every run begins with a collection of
    garbage (accelerate's `free_memory`) that otherwise walks through 700,000 objects of libraries: half of a tiny run.
    """
    gc.collect()
    gc.freeze()
