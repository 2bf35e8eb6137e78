"""timm.create_model(name, num_classes = k, in_chans = c) behind (x - mean) / std

PyTorch Image Models (Wightman 2019, github.com/huggingface/pytorch-image-models): any architecture of that package, as
`timm:NAME` or by the setting `name`. Extra `zoo`.

Differs from calling the package: the net normalizes its images as all of bench do; a vision transformer is built for
the side of the data's images; attention is computed without fused kernels, which have no second derivative. The names
of its weights are those of timm, so that its checkpoints fit.

`pretrained` begins at the weights of that name (resnet18.a1_in1k; without a tag the package's choice) in the cache of
the Hugging Face Hub, or from there; the head is new where the number of classes is another.
"""

import difflib
from typing import Any

from torch import nn

from bench.core.extras import imported
from bench.models.common import Inputs, Normalize

revision = 1
settings_once_trained = {"pretrained": False}


def build(inputs: Inputs, *, name: str = "", pretrained: bool = False) -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ImportError without timm, and ValueError in one line for an
    unknown name, for a side that the architecture cannot take, and for weights that cannot be had."""
    timm = imported("timm", 'pip install "defense-bench[zoo]"')
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm {timm.__version__} has no architecture '{name}'; {hint}")
    timm.layers.set_fused_attn(False)
    settings: dict[str, Any] = {"num_classes": inputs.classes, "in_chans": inputs.channels}
    if timm.get_pretrained_cfg(name).fixed_input_size:
        settings["img_size"] = inputs.size
    try:
        net = timm.create_model(name, pretrained=pretrained, **settings)
    except Exception as error:
        text = f"timm:{name} with {settings}: {type(error).__name__}: {' '.join(str(error).split())}"
        had = f"; where the Hub can be reached: hf download timm/{name}, then copy its cache here and set HF_HOME to it"
        raise ValueError(text + had * pretrained) from None
    return _normalized(net, inputs)


def _normalized(net: nn.Module, inputs: Inputs) -> nn.Module:
    """The same net, which normalizes first. A subclass, for a module around it would rename all weights, and a hook is
    not seen by what traces the net."""

    plain = type(net)
    net.normalise = Normalize(inputs)
    net.__class__ = type(plain.__name__, (plain,), {"forward": lambda self, x: plain.forward(self, self.normalise(x))})
    return net
