"""`es-trl dry-run --gpu` answers from shapes alone; memory that small cards do not have can be saved by settings."""

import functools
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import flux, stable_diffusion
from tiny_runs import PROMPTS, WHOLE, same, theta_of, tiny_trainer
from torch import nn

from es_trl.cli import main, memory_plan
from es_trl.cli.arguments import parse
from es_trl.cli.fitting import gigabytes
from es_trl.cli.memory_plan import plan_memory
from es_trl.es import Factors, Perturbations
from es_trl.pipelines import LiveBytes, PipelineAdapter, equal_blocks_once, known_shapes, set_up, shorten


MEGA = 1_000_000


# --- counting ---


@torch.no_grad()
def test_what_is_alive_at_once_is_counted_and_weights_are_not():
    layer = nn.Linear(1000, 1000, device="meta")
    start = torch.empty(1000, 1000, device="meta")
    with LiveBytes() as live:
        out = layer(layer(layer(start.T)))
    assert (live.peak, live.live) == (8 * MEGA, 4 * MEGA)
    del out
    assert live.live == 0


@torch.no_grad()
def test_a_convolution_takes_a_copy_of_its_input_and_attention_no_table():
    convolution = nn.Conv2d(1, 1, 3, padding=1, device="meta")
    with LiveBytes() as live:
        convolution(torch.empty(1, 1, 1000, 1000, device="meta"))
    assert live.peak == 3 * 4 * MEGA
    query = torch.empty(1, 8, 1000, 125, device="meta")
    with LiveBytes() as live:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert live.peak == 4 * MEGA


def test_numbers_that_are_known_decide_and_mix_with_those_that_are_not():
    weights = torch.empty(10, 4, device="meta")
    with LiveBytes():
        places = torch.arange(10, device="meta")
        rows = weights[places % 2 == 0]
        moved = rows + torch.ones(4)
    assert places.tolist() == list(range(10)) and rows.shape == (5, 4) and moved.is_meta


class Layer(nn.Module):
    """A language model's: it widens, keeps something in a cache, and has two outputs, one of them in a tuple."""

    def __init__(self, returns_its_input: bool):
        super().__init__()
        self.wide, self.narrow = nn.Linear(100, 400, device="meta"), nn.Linear(400, 100, device="meta")
        self.returns_its_input, self.calls = returns_its_input, 0

    def forward(self, x, cache=None):
        self.calls += 1
        cache.kept.append(x * 2)
        out = self.narrow(self.wide(x).relu())
        return (x, (out,)) if self.returns_its_input else (out + 1, (out, None))


@torch.no_grad()
@pytest.mark.parametrize(("returns_its_input", "calls"), [(False, 1), (True, 5)])
def test_equal_blocks_are_gone_through_once_and_counted_every_time(returns_its_input, calls):
    def run(once):
        layers, live, cache = nn.ModuleList(Layer(returns_its_input) for _ in range(5)), LiveBytes(), SimpleNamespace()
        cache.kept, x = [], torch.empty(1000, 100, device="meta")
        states, seen = [], []
        with live, equal_blocks_once(live, [layers]) if once else nullcontext():
            for layer in layers:
                x, more = layer(x, cache=cache)
                states.append(more[0])
                seen.append((live.live, live.peak, x.shape, len(more)))
        del x, states, more, cache
        return seen, live.live, sum(layer.calls for layer in layers)

    seen, left, gone_through = run(True)
    assert gone_through == calls
    assert (seen, left) == run(False)[:2] and left == 0


# --- a plan ---


def planned(tmp_path: Path, **options):
    given = {
        "model_name_or_path": "tiny-sana-sprint",
        "reward_funcs": "tiny-pickscore",
        "dataset_name": "tiny-train",
        "output_dir": tmp_path,
        "use_cpu": True,
        "members_per_forward": 32,
        "sample_steps": 0,
        "max_sequence_length": 16,
        "guidance_scale": 2.0,
    } | options
    if given.get("method", "es") != "es":
        del given["members_per_forward"]
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return plan_memory(*parse(args=words))


def moment(plan, name: str):
    return next(moment for moment in plan.moments if moment.name.startswith(name))


def test_every_setting_that_saves_memory_shows_in_the_plan(tmp_path):
    plan = planned(tmp_path)
    assert [m.name for m in plan.moments] == [
        "encoding prompts", "denoising 32 images", "decoding 32 images", "scoring",
    ]  # fmt: skip
    adapter = tiny_trainer(tmp_path / "run", **WHOLE).adapter
    weights = sum(p.numel() for n, p in adapter.denoiser.named_parameters() if "lora" not in n) * 4 / 1e9
    assert plan.peak.parts["denoiser"] == pytest.approx(weights, rel=0.01)
    decoding = moment(plan, "decoding").parts["activations"]
    halved = moment(planned(tmp_path, members_per_forward=16), "decoding").parts["activations"]
    assert halved == pytest.approx(decoding / 2, rel=0.05)
    assert moment(planned(tmp_path, vae_slicing=True), "decoding").parts["activations"] < decoding / 2
    assert "text encoders" in plan.peak.parts
    assert "text encoders" not in moment(planned(tmp_path, release_text_encoder=True), "decoding").parts
    assert planned(tmp_path, dtype="bfloat16").peak.parts["denoiser"] == pytest.approx(weights / 2, rel=0.01)
    quantised = json.dumps({"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}})
    assert planned(tmp_path, quantization_config=quantised).peak.parts["denoiser"] < 0.6 * weights
    elsewhere = planned(tmp_path, reward_device="cpu")
    assert "rewards" not in elsewhere.peak.parts and "scoring" not in [m.name for m in elsewhere.moments]


@torch.no_grad()
def test_the_count_is_that_of_real_tensors(tmp_path):
    """What kernels take on top is measured by recipes/benchmarks/true_widths.py --memory: docs/scale.md."""
    adapter = tiny_trainer(tmp_path / "run", **WHOLE).adapter
    call = adapter.settings.call_kwargs(adapter.pipe, guidance_scale=2.0) | adapter.prompts.rows(PROMPTS[:1] * 32)
    generators = [torch.Generator().manual_seed(i) for i in range(32)]
    with LiveBytes() as live:
        adapter.pipe(**call, generator=generators, output_type="pt")
    plan = planned(tmp_path, method="grpo", images_per_forward=32, images_per_backward=1)
    counted = max(m.parts["activations"] for m in plan.moments if m.name.startswith(("denoising", "decoding")))
    assert counted == pytest.approx(live.peak / 1e9, rel=0.15)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shortened_model_is_counted_as_the_whole_one(tmp_path, monkeypatch, checkpointed):
    """Sana Sprint 0.6B is a row of equal blocks (here nine), of which two are gone through."""
    shapes = known_shapes()
    model = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"
    shapes[model]["components"]["text_encoder"]["num_hidden_layers"] = 1  # for the time it takes
    shapes[model]["components"]["transformer"]["num_layers"] = 9
    monkeypatch.setattr("es_trl.pipelines.empty.known_shapes", lambda: shapes)
    options = {"model_name_or_path": model, "method": "grpo", "height": 256, "width": 256, "images_per_forward": 2,
               "images_per_backward": 1, "checkpoint_activations": checkpointed, "dtype": "bfloat16"}  # fmt: skip
    memory_plan._empty.cache_clear()
    short = planned(tmp_path, **options)
    memory_plan._empty.cache_clear()
    monkeypatch.setattr(memory_plan, "shorten", lambda module: {})
    whole = planned(tmp_path, **options)
    memory_plan._empty.cache_clear()
    for a, b in zip(short.moments, whole.moments, strict=True):
        assert a.total == pytest.approx(b.total, rel=0.01), a.name
        assert a.parts.get("activations", 0) == pytest.approx(b.parts.get("activations", 0), rel=0.02, abs=0.005)


@pytest.mark.parametrize(("model", "length"), [("stabilityai/sd-turbo", None), ("Tongyi-MAI/Z-Image-Turbo", 16)])
def test_a_plan_is_that_of_a_model_of_which_every_block_is_gone_through(tmp_path, monkeypatch, model, length):
    shapes = known_shapes()
    shapes[model]["components"]["text_encoder"]["num_hidden_layers"] = 4  # for the time it takes
    monkeypatch.setattr("es_trl.pipelines.empty.known_shapes", lambda: shapes)
    memory_plan._empty.cache_clear()
    options = {"model_name_or_path": model, "max_sequence_length": length, "height": 256, "width": 256}
    plans = [planned(tmp_path, **options, es_space=space) for space in ("lora", "weight")]
    monkeypatch.setattr(memory_plan, "equal_blocks_once", lambda *_: nullcontext())
    assert plans == [planned(tmp_path, **options, es_space=space) for space in ("lora", "weight")]
    memory_plan._empty.cache_clear()


def test_shortening_leaves_two_of_equal_blocks_alone():
    row = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    net = nn.ModuleDict({"equal": row, "few": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)),
                         "other": nn.ModuleList(nn.Linear(2, size) for size in range(1, 7))})  # fmt: skip
    assert shorten(net) == {"equal.1": 6}
    assert [len(net[name]) for name in ("equal", "few", "other")] == [2, 3, 6]


def test_every_model_s_shapes_say_where_they_are_from():
    assert len(known_shapes()) >= 9
    assert all(len(shapes["source"]) > 40 for shapes in known_shapes().values())


# --- the answer ---


def dry_run(tmp_path, *options) -> list[str]:
    return ["dry-run", "--model_name_or_path", "stabilityai/sd-turbo", "--reward_funcs", "pickscore",
            "--dataset_name", "nobody/has-downloaded-this", "--output_dir", str(tmp_path), "--guidance_scale", "0",
            *options]  # fmt: skip


def test_it_fits_or_these_settings_make_it(tmp_path, capsys):
    assert main(dry_run(tmp_path, "--gpu", "80GB")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"fits +\d+\.\d of 80 GB at most, decoding 8 images; not measured on a GPU", last)
    options = ["--gpu=9GB", "--dtype", "bfloat16"]
    assert main(dry_run(tmp_path, *options)) == 1
    lines = capsys.readouterr().out.splitlines()
    changes = [line.split("change", 1)[1].strip() for line in lines if line.startswith("change")]
    assert changes == ["release_text_encoder: true", "vae_slicing: true"]
    assert lines[-1].startswith("then") and float(lines[-1].split()[1]) <= 9
    words = [word for change in changes for word in ("--" + change.split(": ")[0], change.split(": ")[1])]
    assert main(dry_run(tmp_path, *options, *words)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "much"], "--gpu must be the size of a card, such as 12GB, got 'much'"),
        (["--gpu", "8GB", "--model_name_or_path", "nobody/nothing"], "Shapes of these models ship"),
        (["--gpu", "8GB", "--vae_slicin", "true"], "vae_slicing"),
    ],
)
def test_what_cannot_be_answered_is_one_line(tmp_path, capsys, options, message):
    assert main(dry_run(tmp_path, *options)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_size_of_a_card():
    assert [gigabytes(text) for text in ("12GB", "12", "12 GiB", "7.5gb")] == [12, 12, 12, 7.5]


# --- the settings themselves ---


def test_the_text_encoder_is_there_before_the_denoiser_and_gone_when_it_comes(tmp_path, monkeypatch):
    events, own = [], nn.Module.to

    def to(module, *args, **kwargs):
        events.append(type(module).__name__)
        return own(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    trainer = tiny_trainer(tmp_path, max_steps=1, release_text_encoder=True)
    pipe = trainer.adapter.pipe
    encoder, denoiser = type(pipe.text_encoder).__name__, type(pipe.transformer).__name__
    assert encoder in events and denoiser not in events
    encode = pipe.text_encoder.forward
    pipe.text_encoder.forward = functools.wraps(encode)(
        lambda *args, **kwargs: events.append("encode") or encode(*args, **kwargs)
    )
    trainer.train()
    assert events.index("encode") < events.index(denoiser) and trainer.adapter.pipe.text_encoder is None
    last = max(i for i, event in enumerate(events) if event == "encode")
    assert denoiser not in events[:last]


def test_without_a_release_nothing_waits_and_a_picture_brings_what_waited(tmp_path):
    trainer = tiny_trainer(tmp_path / "a", max_steps=1)
    assert trainer.adapter._waits_for is None
    early = tiny_trainer(tmp_path / "b", max_steps=1, release_text_encoder=True, eval_dataset=PROMPTS[:2])
    early.evaluate()
    assert early.adapter._waits_for is None and early.adapter.pipe.text_encoder is not None
    for each in (trainer, early):
        each.train()
    assert same(theta_of(trainer), theta_of(early))


def test_encoders_are_asked_where_they_are(monkeypatch):
    """While the denoiser waits elsewhere, a pipeline believes that it draws where its first part is."""
    adapter = PipelineAdapter(flux())
    asked, own = [], adapter.pipe.encode_prompt

    @functools.wraps(own)
    def spy(*args, **kwargs):
        asked.append(kwargs["device"])
        return own(*args, **kwargs)

    monkeypatch.setattr(type(adapter.pipe), "_execution_device", torch.device("meta"))
    there = {"device": torch.device("meta"), "max_sequence_length": 8}
    embeddings, *_ = adapter.prompts._encode(spy, ("prompt", "prompt_2"), [("a cat", "a cat")], there)
    assert asked == [torch.device("cpu")] and embeddings.device.type == "cpu"


def test_a_gpu_never_holds_the_noise_of_all_members(tmp_path, monkeypatch):
    """Of the members that are drawn now all matrices, or of all members one matrix; the rest waits on the CPU."""
    trainer = tiny_trainer(tmp_path, max_steps=1, population_size=8, members_per_forward=2, self_check=True)
    drawn_on, moved, chosen = [], [], []
    own_draw, own_to, own_select = type(trainer.noise).draw, Factors.to, Perturbations.select

    def draw(bank, step, directions, micro=0, device="cpu", **more):
        drawn_on.append((len(directions), str(device)))
        return own_draw(bank, step, directions, micro, device, **more)

    def to(factors, device):
        moved.append((len(factors.U), device))
        return own_to(factors, device)

    def select(factors, directions, device):
        chosen.append((len(directions), device))
        return own_select(factors, directions, device)

    monkeypatch.setattr(type(trainer.noise), "draw", draw)
    monkeypatch.setattr(Factors, "to", to)
    monkeypatch.setattr(Perturbations, "select", select)
    trainer.train()
    sites, device = len(trainer.adapter.space.sites), next(iter(trainer.adapter.theta.values())).device
    assert drawn_on == [(8, "cpu")]
    assert moved == [(8, device)] * sites, "one matrix after the other"
    assert set(chosen) == {(1, device), (2, device)}


def test_slicing_and_tiling_are_the_autoencoder_s_own(tmp_path):
    whole = tiny_trainer(tmp_path / "a", max_steps=1)
    sliced = tiny_trainer(tmp_path / "b", max_steps=1, vae_slicing=True, vae_tiling=True)
    assert sliced.adapter.pipe.vae.use_slicing and sliced.adapter.pipe.vae.use_tiling
    assert not whole.adapter.pipe.vae.use_slicing
    for trainer in (whole, sliced):
        trainer.train()
    for name, value in theta_of(whole).items():
        torch.testing.assert_close(value, theta_of(sliced)[name], atol=1e-3, rtol=1e-3)


def test_a_switch_that_a_pipeline_does_not_have_is_refused():
    pipe = stable_diffusion()
    pipe.vae = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"vae_slicing=True: the autoencoder of StableDiffusionPipeline \(Linear\)"):
        set_up(pipe, vae_slicing=True)


def test_a_schedule_is_changed_by_name():
    pipe = stable_diffusion()
    set_up(pipe, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"})
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.scheduler.config.timestep_spacing == "trailing" and pipe.scheduler.config.beta_end == 0.012
    with pytest.raises(ValueError, match="scheduler_config: EulerDiscreteScheduler takes no 'timestep_spacin'"):
        set_up(pipe, {"timestep_spacin": "trailing"})
    with pytest.raises(ValueError, match="diffusers has no scheduler 'EulerScheduler'"):
        set_up(pipe, {"_class_name": "EulerScheduler"})


def test_rewards_run_in_their_own_dtype_and_place(tmp_path):
    trainer = tiny_trainer(tmp_path, "tiny-pickscore", reward_dtype="bfloat16", reward_device="cpu", max_steps=1)
    scorers = [*trainer.rewards.scorers().values(), *trainer.scored.rewards.scorers().values()]
    assert scorers and all(scorer.dtype == torch.bfloat16 and scorer.device.type == "cpu" for scorer in scorers)
    trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_device": "gpu"}, "reward_device must name a device such as cpu or cuda:1, got 'gpu'"),
        ({"text_encoder_device": "cpu"}, "text_encoder_device='cpu' acts with release_text_encoder=True only"),
        ({"reward_dtype": "int8"}, "reward_dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"scheduler_config": "trailing"}, "scheduler_config must be a JSON object"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_trainer(tmp_path, **options)
