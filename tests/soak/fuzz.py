"""
Feeds the parsers damaged input, and counts the answers: accepted, refused with the documented error, or anything else.

    python tests/soak/fuzz.py --inputs 1000000 --output outputs/fuzz.json

The parsers: prompt files (.txt, .csv, .tsv, .jsonl), YAML configs, journals, the scores in them, checkpoint manifests
and their JSON and safetensors files, and the replies of a remote reward. Inputs are bytes: whole files of each kind,
cut, repeated, spliced, with bytes, numbers and JSON values replaced. Each input is made from its number alone, so that
one that fails can be made again.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
from safetensors.torch import save  # noqa: E402

from es_trl.cli import load_config  # noqa: E402
from es_trl.data.prompt_files import read_columns  # noqa: E402
from es_trl.replay import ReplayError  # noqa: E402
from es_trl.replay.replay import read_journal  # noqa: E402
from es_trl.rewards.endpoint import Endpoint, EndpointError  # noqa: E402
from es_trl.rewards.remote import check_scores  # noqa: E402
from es_trl.run import CheckpointCorrupt  # noqa: E402
from es_trl.run.checkpoint import (  # noqa: E402
    MANIFEST,
    SCALARS_FILE,
    STATE_FILE,
    STATE_JSON,
    check_trainer_state,
    load_adapter_state,
    load_logs,
    verify_checkpoint,
)
from es_trl.run.journal import JOURNAL, decode_scores, encode_scores  # noqa: E402


class CannedEndpoint(Endpoint):
    """An endpoint whose server answers with `data`; all that comes after the network is its own."""

    data = b""

    async def _post(self, client, body: bytes) -> bytes:
        return self.data


class Parsers:
    """Every parser as a function of bytes, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.endpoint, self.loop = CannedEndpoint("http://127.0.0.1:1/"), asyncio.new_event_loop()
        self.table: dict[str, tuple[Callable[[bytes], object], tuple[type, ...]]] = {
            ".txt prompts": (self.prompts(".txt"), (ValueError,)),
            ".csv prompts": (self.prompts(".csv"), (ValueError,)),
            ".tsv prompts": (self.prompts(".tsv"), (ValueError,)),
            ".jsonl prompts": (self.prompts(".jsonl"), (ValueError,)),
            "YAML config": (self.config, (ValueError, TypeError, SystemExit)),  # the last is argparse's
            "journal": (self.journal, (ReplayError,)),
            "scores of a journal": (self.scores, (ValueError,)),
            "manifest": (self.manifest, (CheckpointCorrupt,)),
            "trainer state": (self.trainer_state, (CheckpointCorrupt,)),
            "optimizer state": (self.optimizer, (CheckpointCorrupt,)),
            "safetensors": (self.tensors, (CheckpointCorrupt,)),
            "reply of a remote reward": (self.reply, (EndpointError,)),
        }

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def prompts(self, suffix: str) -> Callable[[bytes], object]:
        return lambda data: read_columns(str(self.write(f"prompts{suffix}", data)), "prompt")

    def config(self, data: bytes) -> None:
        environment = dict(os.environ)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                load_config(str(self.write("config.yaml", data)))
        finally:  # a config may set variables
            os.environ.clear()
            os.environ.update(environment)

    def journal(self, data: bytes) -> None:
        self.write(JOURNAL, data)
        read_journal(self.folder)

    def scores(self, data: bytes) -> None:
        head, _, text = data.partition(b"\n")
        decode_scores(list(head[:3]), text.decode("latin-1"))

    def manifest(self, data: bytes) -> None:
        self.write(MANIFEST, data)
        verify_checkpoint(self.folder)

    def trainer_state(self, data: bytes) -> None:
        self.write(STATE_JSON, data)
        check_trainer_state(self.folder)

    def optimizer(self, data: bytes) -> None:
        self.write(SCALARS_FILE, data)
        load_logs(self.folder)

    def tensors(self, data: bytes) -> None:
        self.write(STATE_FILE, data)
        load_adapter_state(self.folder)

    def reply(self, data: bytes) -> None:
        self.endpoint.data = data
        check_scores(self.loop.run_until_complete(self.endpoint.ask({})), 2, self.endpoint)


SCORES = encode_scores(torch.arange(4.0, dtype=torch.float64).view(2, 2, 1))
START = {"start": 0, "run": {"config": {"sigma": 0.1}, "base_model": "toy", "lora": {}}}
STEP = {"step": 0, "micro": 0, "theta": "0" * 64, "prompts": ["a", "b"], "shape": [2, 2, 1], "scores": SCORES}
STATE = {"global_step": 3, "max_steps": 9, "log_history": [{"loss": 1.5, "step": 1}], "stateful_callbacks": {}}
ENTRY = {"sha256": "0" * 64, "size": 12}
FILES = (STATE_FILE, SCALARS_FILE, "es_config.json", STATE_JSON)
SEEDS = {
    ".txt prompts": [
        b"a red apple\r\ntwo blue cats\n\n  a frog \n",
        "\ufeffeine Katze\n\U0001f600\n".encode(),
    ],
    ".csv prompts": [b'prompt,category\n"a cat, red",x\na dog,y\n', b"prompt\n'a'\n"],
    ".tsv prompts": [b'Prompt\tCategory\na "cat\tx\n'],
    ".jsonl prompts": [b'{"prompt": "a cat", "n": 3}\n{"prompt": "a dog"}\n'],
    "YAML config": [
        b"sigma: 0.1\nreward_funcs: [pickscore]\nenv:\n  A: b\n",
        b"# x\nmax_steps: 3\noptim: !!str sgd\n",
    ],
    "journal": ["".join(json.dumps(line) + "\n" for line in (START, STEP)).encode()],
    "scores of a journal": [bytes([2, 2, 1]) + b"\n" + SCORES.encode()],
    "manifest": [json.dumps(dict.fromkeys(FILES, ENTRY)).encode()],
    "trainer state": [json.dumps(STATE).encode()],
    "optimizer state": [
        b'{"param_groups": [{"lr": 0.1}], "state": {}, "logs": {"loss": 1.0, "logged_at": 2, "sums": {"a": [0.5, 2]}}}'
    ],
    "safetensors": [save({"theta.a": torch.ones(2, 3), "optimizer.0.m": torch.zeros(4)})],
    "reply of a remote reward": [b'{"scores": [0.5, null]}', b"[1, 2e3]"],
}
TOKENS = [
    b"null", b"-1", b"1e999", b"NaN", b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b'"\\ud800"', b"\x00", b"\xff\xfe",
    b"\r", b"\n", b"'", b'"', b"\t", b",", b": ", b"!!python/object:os.system", b"&a [*a, *a]", b"<<: *a", b"true",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"../../x", b"/etc/passwd", b"{}", b"[]", b"0x10", b"1_000", b"---\n", b"${A}",
]  # fmt: skip


def damaged(kind: str, number: int) -> bytes:
    """Input `number` of a kind: a function of both."""
    rng = random.Random(f"{kind}|{number}")
    data = bytearray(rng.choice(SEEDS[kind]))
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(200))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 1, 2, 4, 16, 64)))
        move = rng.randrange(6)
        if move == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif move == 1:
            data[start:end] = b""
        elif move == 2:
            data[start:start] = data[start:end] * rng.choice((1, 2, 30))
        elif move == 3:
            data[start:end] = rng.choice(TOKENS)
        elif move == 4:
            data[start:end] = rng.randbytes(rng.choice((1, 2, 8)))
        else:
            other = rng.choice(SEEDS[rng.choice(list(SEEDS))])
            data[start:end] = other[rng.randrange(len(other)) :][: rng.randrange(40)]
    return bytes(data)


def answer(parsers: Parsers, kind: str, data: bytes) -> str:
    """`accepted`, `refused`, or the name of an error that no page of the documentation mentions."""
    parse, documented = parsers.table[kind]
    try:
        parse(data)
    except documented:
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {''.join(traceback.format_tb(error.__traceback__)[-1:]).strip()[:300]}"
    return "accepted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in total")
    parser.add_argument("--output", default="outputs/fuzz.json")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder, began = Path(tempfile.mkdtemp(prefix="es_trl-fuzz-", dir=memory)), time.monotonic()
    parsers = Parsers(folder)
    answers = {kind: Counter() for kind in SEEDS}
    examples: dict[str, list] = {}
    slow = arguments.inputs // 100  # a config is parsed with all fields of the trainers: tens of milliseconds
    shares = dict.fromkeys(SEEDS, -(-(arguments.inputs - slow) // (len(SEEDS) - 1))) | {"YAML config": slow}
    rounds = 100
    for turn in range(rounds):
        for kind, share in shares.items():
            for number in range(share * turn // rounds, share * (turn + 1) // rounds):
                said = answer(parsers, kind, damaged(kind, number))
                answers[kind][said] += 1
                if said not in ("accepted", "refused"):
                    examples.setdefault(f"{kind}: {said}", []).append(number)
        result = {
            "inputs": sum(sum(counter.values()) for counter in answers.values()),
            "seconds": round(time.monotonic() - began, 1),
            "answers": {kind: dict(counter) for kind, counter in answers.items()},
            "undocumented": {text: numbers[:5] for text, numbers in examples.items()},
        }
        os.makedirs(os.path.dirname(os.path.abspath(arguments.output)), exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    sys.exit(int(bool(result["undocumented"])))


if __name__ == "__main__":
    main()
