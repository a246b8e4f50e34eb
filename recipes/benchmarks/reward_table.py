"""
The published formula of every reward against ours on the same pictures, and milliseconds per picture, as Markdown.

    python recipes/benchmarks/reward_table.py
    python recipes/benchmarks/reward_table.py --published   # the true sizes: minutes, 10 GB

The real weights cannot be part of this: networks have random weights of the right architecture, or the shipped ones.
"""

import argparse
import gc
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from transformers import BertTokenizer, CLIPConfig, CLIPModel


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from es_trl.assets import resolve  # noqa: E402
from es_trl.cli.reward import synthetic_pictures  # noqa: E402
from es_trl.rewards import Human, RewardSet  # noqa: E402
from es_trl.rewards.clip_aesthetic import POSITIVE_TEXTS  # noqa: E402
from es_trl.rewards.no_artifacts import NEGATIVE_TEXTS  # noqa: E402
from recipes.benchmarks import reward_references as references  # noqa: E402


LONG = "a lighthouse on a cliff above a stormy sea, " * 12  # beyond every text encoder's limit
PROMPTS = ["a red circle on white", "two blue dogs", 'a sign that says "OPEN"', LONG]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(c for i in range(33, 127) for c in (chr(i), "##" + chr(i)))]

# name -> (width, layers, heads, feed-forward, patch) of the picture's encoder, the same of the prompt's, features
CLIPS = {
    "ViT-B/32": ((768, 12, 12, 3072, 32), (512, 12, 8, 2048), 512),
    "ViT-L/14": ((1024, 24, 16, 4096, 14), (768, 12, 12, 3072), 768),
    "ViT-H/14": ((1280, 32, 16, 5120, 14), (1024, 24, 16, 4096), 1024),
}
BLIPS = {
    "ViT-B/16 + 4-layer BERT": ({"width": 768, "depth": 12, "mlp": 3072}, {"width": 768, "depth": 4, "mlp": 3072}),
    "ViT-L/16 + BERT-base": ({"width": 1024, "depth": 24, "mlp": 4096}, {"width": 768, "depth": 12, "mlp": 3072}),
}


@dataclass
class Case:
    """One line of the table: both callables take prompts and pictures and return one number per picture."""

    name: str
    weights: str
    compared_with: str
    ours: Callable
    reference: Callable
    prompts: list[str]
    images: list[Image.Image]


def pictures() -> list[Image.Image]:
    """Nothing, a circle, a word, noise; of four shapes, one of them smaller than the networks' 224 pixels."""
    shapes = ((256, 256), (320, 200), (224, 224), (150, 180))
    circle, sign, noise, white = (synthetic_pictures(256)[i] for i in (1, 2, 3, 0))
    return [image.resize(shape) for image, shape in zip((circle, white, sign, noise), shapes, strict=True)]


def clip_folder(folder: Path, size: str) -> str:
    """A CLIP of transformers with random weights, seed 0."""
    path = folder / f"clip-{size.replace('/', '-')}"
    if not path.exists():
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        vision, text, features = CLIPS[size]
        ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        config = CLIPConfig(
            vision_config=dict(zip(keys, vision, strict=True)),
            text_config=dict(zip(keys[:-1], text, strict=True)) | ends,
            projection_dim=features,
        )
        torch.manual_seed(0)
        model = CLIPModel(config)
        with torch.no_grad():
            model.logit_scale.fill_(np.log(100))
        model.save_pretrained(path)
        references.clip_processor().save_pretrained(path)
    return str(path)


def shipped_case(folder: Path, published: bool, images) -> Iterator[Case]:
    yield Case("tiny-pickscore", "the shipped ones", "the model card's formula", ours("tiny-pickscore"),
               references.Clip(resolve("tiny-pickscore")).pickscore, PROMPTS, images)  # fmt: skip


def similarity_cases(folder: Path, published: bool, images) -> Iterator[Case]:
    path = clip_folder(folder, "ViT-B/32")
    plain = references.Clip(path)
    called = {
        "clip_text": plain.similarity,
        "clip_aesthetic": lambda prompts, images: plain.mean_similarity(POSITIVE_TEXTS, images),
        "no_artifacts": lambda prompts, images: [1 - s for s in plain.mean_similarity(NEGATIVE_TEXTS, images)],
    }
    for name, reference in called.items():
        yield Case(name, "random, CLIP ViT-B/32", "CLIPModel by its parts", ours(f"{name}:{path}"), reference,
                   PROMPTS, images)  # fmt: skip


def preference_cases(folder: Path, published: bool, images) -> Iterator[Case]:
    size = "ViT-H/14" if published else "ViT-B/32"
    path = clip_folder(folder, size)
    plain = references.Clip(path)
    yield Case("pickscore", f"random, CLIP {size}", "the model card's formula", ours(f"pickscore:{path}"),
               plain.pickscore, PROMPTS, images)  # fmt: skip

    def win_rates(prompts, images):
        scores = np.array(plain.pickscore(prompts, images))
        win = 1 / (1 + np.exp(scores[None] - scores[:, None]))
        return (win.sum(axis=1) - 0.5) / (len(scores) - 1)

    yield Case("pairwise", f"random, CLIP {size}", "wins by the formula above", ours(f"pairwise:{path}"), win_rates,
               [PROMPTS[0]] * len(images), images)  # fmt: skip


def aesthetic_case(folder: Path, published: bool, images) -> Iterator[Case]:
    size = "ViT-L/14" if published else "ViT-B/32"
    path = clip_folder(folder, size)
    head, plain = references.head_weights(CLIPS[size][2]), references.Clip(path)
    torch.save(head, Path(path, "aesthetic-model.pth"))
    yield Case("aesthetic", f"random, CLIP {size} and head", "the head's layers in double precision",
               ours(f"aesthetic:{path}"), lambda prompts, images: plain.aesthetic(head, images),
               PROMPTS, images)  # fmt: skip


def hpsv2_case(folder: Path, published: bool, images) -> Iterator[Case]:
    size = "ViT-H-14" if published else "ViT-B-32"
    settings = open_clip.get_model_config(size)
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings).eval()
    path = folder / "hpsv2"
    path.mkdir()
    torch.save({"state_dict": model.state_dict()}, path / "HPS_v2.1_compressed.pt")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    yield Case("hpsv2", f"random, open_clip {size}", "open_clip's own forward", ours(f"hpsv2:{path}"),
                lambda prompts, images: references.hpsv2(model, prompts, images), PROMPTS, images)  # fmt: skip


def image_reward_case(folder: Path, published: bool, images) -> Iterator[Case]:
    size = list(BLIPS)[published]
    vision, text = BLIPS[size]
    weights = references.image_reward_weights(
        vision | {"patch": 16, "side": 224}, text | {"words": 30524, "places": 512}
    )
    path = folder / "image_reward"
    path.mkdir()
    torch.save(weights, path / "ImageReward.pt")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = {"hidden_size": text["width"], "num_hidden_layers": text["depth"], "intermediate_size": text["mlp"],
              "num_attention_heads": 12, "vocab_size": 30524, "max_position_embeddings": 512,
              "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}  # fmt: skip
    (path / "med_config.json").write_text(json.dumps(config))
    tokenizer = BertTokenizer.from_pretrained(path)

    def reference(prompts, images):
        ids = tokenizer(prompts, truncation=True, max_length=35)["input_ids"]
        return [
            references.image_reward(
                weights, references.blip_picture(image, 224), torch.tensor(row), (vision["width"] // 64, 12)
            )
            for image, row in zip(images, ids, strict=True)
        ]

    yield Case("image_reward", f"random, {size}", "the architecture written out in torch",
                ours(f"image_reward:{path}"), reference, PROMPTS, images)  # fmt: skip


def file_size_cases(folder: Path, published: bool, images) -> Iterator[Case]:
    def kilobytes(prompts, images):
        sizes = []
        for image in images:
            image.save(folder / "picture.jpg", quality=95)
            sizes.append((folder / "picture.jpg").stat().st_size / 1000)
        return sizes

    for name, sign in (("jpeg_compressibility", -1), ("jpeg_incompressibility", 1)):
        yield Case(name, "none", "the size of a file on disk", ours(name),
                   lambda prompts, images, sign=sign: [sign * size for size in kilobytes(prompts, images)],
                   PROMPTS, images)  # fmt: skip


def ocr_case(folder: Path, published: bool, images) -> Iterator[Case]:
    from rapidocr import RapidOCR

    sign = synthetic_pictures(256)[2]
    wanted = ["OPEN", "open", "OPENED", "closed"]
    engine = RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False})

    def reference(prompts, images):
        sign.save(folder / "sign.png")  # the reader opens the file itself
        text = "".join(engine(str(folder / "sign.png")).txts or ())
        return [references.text_score(text, word) for word in wanted]

    yield Case("ocr", "those in RapidOCR's wheel", "RapidOCR on a file, recursive edit distance", ours("ocr"),
                reference, [f'a sign that says "{word}"' for word in wanted], [sign] * 4)  # fmt: skip


class Answers(BaseHTTPRequestHandler):
    """A reward server, and a judge that is sure of Yes to the degree that the question is long."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" in body:
            chance = judged(body["messages"][0]["content"][-1]["text"])
            top = [{"token": token, "logprob": float(np.log(p / 2))} for token, p in
                   ((" Yes", chance), ("yes", chance), ("No", 2 * (1 - chance)))]  # fmt: skip
            choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}
            answer = {"choices": [choice]}
        else:
            pairs = zip(body["prompts"], body["images"], strict=True)
            answer = {"scores": [len(prompt) + len(picture) / 1e6 for prompt, picture in pairs]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def judged(question: str) -> float:
    return 1 / (1 + len(question) / 500)


def server_cases(folder: Path, published: bool, images) -> Iterator[Case]:
    from es_trl.rewards.remote import png_base64
    from es_trl.rewards.vlm_judge import QUESTIONS

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield Case("remote", "none", "what the server computes, here", ours(f"remote:{address}/score"),
               lambda prompts, images: [len(p) + len(png_base64(i)) / 1e6
                                        for p, i in zip(prompts, images, strict=True)], PROMPTS, images)  # fmt: skip
    yield Case("vlm_judge", "none", "P(Yes) of the server, here", ours(f"vlm_judge:stub@{address}/v1"),
               lambda prompts, images: [judged(QUESTIONS["yes_no"].replace("{prompt}", p)) for p in prompts],
               PROMPTS, images)  # fmt: skip
    server.shutdown()


def human_case(folder: Path, published: bool, images) -> Iterator[Case]:
    """A voter that speaks to the page as a browser does and always prefers the wider picture, so wins are known."""
    human = Human(pairing="all")

    def vote_until_done(stop: threading.Event):
        base = human.start()
        while not stop.is_set():
            with urllib.request.urlopen(f"{base}state") as reply:
                state = json.load(reply)
            if state["index"] >= state["total"]:
                time.sleep(0.001)
                continue
            widths = []
            for side in ("left", "right"):
                with urllib.request.urlopen(f"{base}{state['round']}/{state['index']}/{side}.png") as reply:
                    widths.append(Image.open(io.BytesIO(reply.read())).width)
            choice = "left" if widths[0] > widths[1] else "right"
            body = json.dumps({"round": state["round"], "index": state["index"], "choice": choice}).encode()
            with urllib.request.urlopen(urllib.request.Request(f"{base}vote", data=body)):
                pass

    score = ours(human)

    def voted(prompts, images):
        stop = threading.Event()
        voter = threading.Thread(target=vote_until_done, args=(stop,), daemon=True)
        voter.start()
        scores = score(prompts, images)
        stop.set()
        voter.join()
        return scores

    def ranks(prompts, images):
        widths = [image.width for image in images]
        return [sum(width > other for other in widths) / (len(widths) - 1) for width in widths]

    yield Case("human", "none", "rank by width, which a scripted voter prefers", voted, ranks,
                [PROMPTS[0]] * len(images), images)  # fmt: skip


def ours(spec) -> Callable:
    """Loaded at the first call."""
    rewards = RewardSet(spec)
    return lambda prompts, images: rewards(prompts, images)[:, 0]


CASES = {
    ("tiny-pickscore",): shipped_case,
    ("clip_text", "clip_aesthetic", "no_artifacts"): similarity_cases,
    ("pickscore", "pairwise"): preference_cases,
    ("aesthetic",): aesthetic_case,
    ("hpsv2",): hpsv2_case,
    ("image_reward",): image_reward_case,
    ("jpeg_compressibility", "jpeg_incompressibility"): file_size_cases,
    ("ocr",): ocr_case,
    ("remote", "vlm_judge"): server_cases,
    ("human",): human_case,
}


def measured(case: Case, rounds: int) -> dict:
    """Both once to compare, then both in turn to time them."""
    found = np.array(case.ours(case.prompts, case.images), dtype=float)
    expected = np.array(case.reference(case.prompts, case.images), dtype=float)
    seconds = {"ours": [], "reference": []}
    for _ in range(rounds):
        for name, call in (("ours", case.ours), ("reference", case.reference)):
            started = time.perf_counter()
            call(case.prompts, case.images)
            seconds[name].append((time.perf_counter() - started) / len(case.images))
    return {
        "reward": case.name,
        "weights": case.weights,
        "compared with": case.compared_with,
        "reference": expected.tolist(),
        "ours": found.tolist(),
        "difference": float(np.abs(found - expected).max()),
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
    }


def markdown(results: list[dict]) -> str:
    """A row per reward: both values of the first picture, the largest difference over all of them, and the time."""
    lines = [
        "| reward | weights | compared with | reference | ours | largest difference | ms per picture |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        difference = "0" if r["difference"] == 0 else f"{r['difference']:.0e}"
        values = f"{r['reference'][0]:.4f} | {r['ours'][0]:.4f} | {difference} | {r['milliseconds']['ours']:.3g}"
        lines.append(f"| `{r['reward']}` | {r['weights']} | {r['compared with']} | {values} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="networks of the published sizes, up to ViT-H/14")
    parser.add_argument("--only", nargs="+", help="these rewards only")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="write JSON, with the reference's milliseconds too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    load, results = os.getloadavg(), []
    with tempfile.TemporaryDirectory() as folder:
        for names, build in CASES.items():
            if args.only and not set(names) & set(args.only):
                continue
            for case in build(Path(folder), args.published, pictures()):
                results.append(measured(case, args.rounds))
            del case  # and its models
            gc.collect()
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(markdown(results))
        print(
            f"{args.threads} of {os.cpu_count()} {platform.machine()} cores, load average before {load[0]:.1f}, ",
            end="",
        )
        print(f"median of {args.rounds} rounds of {len(pictures())} pictures, seed 0, torch {torch.__version__}.")
    return results


if __name__ == "__main__":
    main()
