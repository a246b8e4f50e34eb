"""How much of a slow server's time a rollout hides: the same reward waited for at once, and while drawing on."""

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from es_trl import ESConfig, ESTrainer, RewardSet
from es_trl.rewards import Remote
from es_trl.trainer.rollout import PopulationRollout, PromptBatch


class SlowServer(BaseHTTPRequestHandler):
    """Answers with the mean red of each picture after `delay` seconds."""

    delay = 0.0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
        scores = [float(np.asarray(picture, dtype=np.float64)[..., 0].mean()) for picture in pictures]
        time.sleep(self.delay)
        content = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def waiting_at_once(remote: Remote):
    """The same reward as a plain function: the rollout stands still until the server has answered."""

    def remote_plain(prompts, images):
        return asyncio.run(remote(prompts, images))

    return remote_plain


def rollout_of(trainer: ESTrainer, reward, args) -> PopulationRollout:
    rewards = RewardSet(reward).load()
    return PopulationRollout(
        trainer.adapter, rewards, trainer.population, args.sigma, args.members_per_forward, seed=0
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-sana-sprint")
    parser.add_argument("--population_size", type=int, default=16)
    parser.add_argument("--members_per_forward", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--delay", type=float, help="seconds per request; as long as drawing a micro-batch by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()

    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = Remote(
        f"http://127.0.0.1:{server.server_address[1]}/", batch_size=args.prompts * args.members_per_forward
    )
    with tempfile.TemporaryDirectory() as folder:
        config = ESConfig(output_dir=folder, population_size=args.population_size, prompts_per_step=args.prompts,
                          members_per_forward=args.members_per_forward, sample_steps=0, save_strategy="no",
                          report_to="none", max_steps=1, use_cpu=True, max_sequence_length=16)  # fmt: skip
        trainer = ESTrainer(args.model, remote, args=config, train_dataset="tiny-train")
        batch = PromptBatch.from_rows([trainer.train_dataset[i] for i in range(args.prompts)], 1)
        trainer.prepare_prompts(batch.prompts)
        factors = trainer.noise.draw(0, range(trainer.population.num_directions))
        rollouts = {
            "overlapped": rollout_of(trainer, remote, args),
            "sequential": rollout_of(trainer, waiting_at_once(remote), args),
        }
        drawing = [rollouts["sequential"].scores(batch, factors, 0)[1].generate for _ in range(2)][-1]
        chunks = args.population_size // args.members_per_forward
        SlowServer.delay = drawing / chunks if args.delay is None else args.delay
        seconds, parts, scores = {name: [] for name in rollouts}, {name: [] for name in rollouts}, {}
        for _ in range(args.repeats):  # in turn, so that other jobs of the machine hit both alike
            for name, rollout in rollouts.items():
                started = time.perf_counter()
                scores[name], times = rollout.scores(batch, factors, 0)
                seconds[name].append(time.perf_counter() - started)
                parts[name].append((times.generate, times.reward))
    server.shutdown()
    ratios = [a / b for a, b in zip(seconds["overlapped"], seconds["sequential"], strict=True)]
    report = {
        "machine": {"cpus": os.cpu_count(), "threads": args.threads, "load_average_before": load_before},
        "settings": vars(args) | {"delay": SlowServer.delay, "requests_per_rollout": chunks},
        "overlapped_to_sequential": {
            "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_drawing": {n: statistics.median(g for g, _ in values) for n, values in parts.items()},
        "seconds_waiting": {n: statistics.median(r for _, r in values) for n, values in parts.items()},
        "same_scores": bool(torch.equal(scores["overlapped"], scores["sequential"])),
    }  # fmt: skip
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
