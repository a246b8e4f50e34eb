"""The small model's denoiser in other storages, as each library's own loader leaves it."""

import bitsandbytes as bnb
import gguf
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from optimum import quanto
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from es_trl.pipelines import load_pipeline


def torchao_int8(pipe):
    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def quanto_int8(pipe):
    quanto.quantize(pipe.transformer, weights=quanto.qint8)
    quanto.freeze(pipe.transformer)


def fp8_casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def gguf_q8_0(pipe):
    def linear(layer: nn.Linear) -> nn.Linear:
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
        data = gguf.quants.quantize(layer.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
        new.weight = GGUFParameter(torch.from_numpy(data), quant_type=gguf.GGMLQuantizationType.Q8_0)
        return new

    _replace(pipe.transformer, linear, lambda layer: layer.in_features % 32 == 0)


def bnb_int8(pipe):
    def linear(layer: nn.Linear) -> nn.Linear:
        options = {"bias": layer.bias is not None, "has_fp16_weights": False}
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, **options)
        new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return new

    _replace(pipe.transformer, linear)


def bnb_nf4(pipe):
    def linear(layer: nn.Linear) -> nn.Linear:
        options = {"bias": layer.bias is not None, "compute_dtype": torch.float32, "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **options)
        values = layer.weight.data.clone()
        new.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=new)._quantize("cpu")
        return new

    _replace(pipe.transformer, linear)


def _replace(model: nn.Module, build, fits=lambda layer: True) -> None:
    """diffusers refuses bitsandbytes without a GPU; the layers themselves run on a CPU, so they are put in by hand."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "transformer_blocks" in name and fits(layer):
            new = build(layer)
            new.bias = layer.bias
            model.set_submodule(name, new.to("cpu").requires_grad_(False))


STORAGES = (torchao_int8, quanto_int8, gguf_q8_0, bnb_int8, bnb_nf4, fp8_casting)


def quantised_sprint(storage=None):
    """The shipped model with its denoiser in a storage; as it is without one."""
    pipe = load_pipeline("tiny-sana-sprint", torch.float32)
    if storage is not None:
        storage(pipe)
    return pipe
