"""nn.MultiheadAttention and the Transformer layers: opaque nodes are opened, or left as they were with a reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2o_compile.passes import decompose as expansion
from tests.helpers.capture import rewritten

B, N, E, H = 2, 30, 32, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor.*:UserWarning", "ignore:.*mask.*:UserWarning")


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def rows(length=N):
    return torch.randn(B, length, E)


def causal(length=N):
    return nn.Transformer.generate_square_subsequent_mask(length)


class Attention(nn.Module):
    """nn.MultiheadAttention of a query to a key and a value; what of the result is returned."""

    def __init__(self, result=0, **options):
        super().__init__()
        options = {"batch_first": True, **options}
        self.attention, self.result = nn.MultiheadAttention(E, H, **options).eval(), result

    def forward(self, q, k, v, **options):
        return self.attention(q, k, v, **options)[self.result]


class Hinted(Attention):
    def forward(self, q, k, v):
        return super().forward(q, k, v, attn_mask=causal(q.shape[1]), is_causal=True, need_weights=False)


class Masked(Attention):
    def forward(self, q, k, v):
        return super().forward(q, k, v, attn_mask=causal(q.shape[1]), need_weights=self.result == 1)


class BoolMasked(Attention):
    def forward(self, q, k, v):
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        return super().forward(q, k, v, attn_mask=hidden)


class Encoder(nn.Module):
    def __init__(self, *, masked, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, **options)
        self.layers, self.masked = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), masked

    def forward(self, x):
        mask = causal(x.shape[1]) if self.masked else None
        return self.layers(x, mask=mask, is_causal=self.masked)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(E, H, 48, batch_first=True).eval()

    def forward(self, x, memory):
        return self.layer(x, memory, tgt_mask=causal(x.shape[1]), tgt_is_causal=True)


def same(count=3):
    return (rows(),) * count


OPENED = {
    "self": (Attention(), same(), ["bidirectional"]),
    "length-first": (Attention(batch_first=False), same(), ["bidirectional"]),
    "cross": (Attention(), (rows(), *(rows(20),) * 2), ["bidirectional"]),
    "three-inputs": (Attention(), (rows(), rows(), rows()), ["bidirectional"]),
    "no-bias": (Attention(bias=False), same(), ["bidirectional"]),
    "separate-projections": (
        Attention(kdim=16, vdim=24), (rows(), rows()[..., :16], rows()[..., :24]), ["bidirectional"],
    ),
    "weights-not-read": (Attention(), same(), ["bidirectional"]),
    "causal-hint": (Hinted(), same(), ["causal"]),
    "causal-mask": (Masked(), same(), ["causal"]),
    "causal-bool-mask": (BoolMasked(), same(), ["causal"]),
    "encoder": (Encoder(masked=False), (rows(),), ["bidirectional"] * 2),
    "encoder-causal": (Encoder(masked=True), (rows(),), ["causal"] * 2),
    "encoder-norm-first-gelu": (
        Encoder(masked=True, norm_first=True, activation="gelu"), (rows(),), ["causal"] * 2,
    ),
    "decoder": (Decoder(), (rows(), rows(20)), ["causal", "bidirectional"]),
}  # fmt: skip


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize(("model", "inputs", "masks"), OPENED.values(), ids=OPENED)
def test_opened_and_rewritten(model, inputs, masks, sizes):
    inputs = tuple(x.clone() for x in dict.fromkeys(inputs)) if len(set(inputs)) == len(inputs) else inputs
    mark = [(x, 1) for x in dict.fromkeys(inputs)] if sizes == "dynamic" else []
    capture = rewritten(model, *inputs, mark=mark)
    assert [record.reason for record in capture.records] == [""] * len(masks)
    assert [record.mask.replace(", offset 0", "") for record in capture.records] == masks
    assert len(capture.calls) == len(masks)
    assert not any(expansion.is_opaque(node) for node in capture.nodes)


class Packed(nn.Module):
    """F.multi_head_attention_forward whose whole result is handed on."""

    def __init__(self):
        super().__init__()
        self.a = Attention().attention

    def forward(self, x):
        result = F.multi_head_attention_forward(
            x, x, x, E, H, self.a.in_proj_weight, self.a.in_proj_bias, None, None, False, 0.0, self.a.out_proj.weight,
            self.a.out_proj.bias, training=False, need_weights=False,
        )  # fmt: skip
        return result[0]


LEFT = {
    "weights-read": (Attention(result=1), same(), {}, "need_weights=False"),
    "causal-mask-and-weights": (Masked(result=1), same(), {}, "need_weights=False"),
    "bias_k": (Attention(add_bias_kv=True), same(), {}, "keys of its own"),
    "add_zero_attn": (Attention(add_zero_attn=True), same(), {}, "keys of its own"),
    "unbatched": (Attention(), (torch.randn(N, E),) * 3, {}, "no batch dimension"),
    "mask-is-an-input": (Attention(), same(), {"attn_mask": causal()}, "adds numbers to the scores"),
    "dropout": (Attention(dropout=0.5).train(), same(), {}, "model.eval()"),
}


@pytest.mark.parametrize(("model", "inputs", "options", "reason"), LEFT.values(), ids=LEFT)
def test_left_as_it_was(model, inputs, options, reason):
    capture = rewritten(lambda *xs: model(*xs, **options) * (0 if model.training else 1), *inputs)
    (record,) = capture.records
    assert not record.rewritten
    assert reason in record.reason
    assert sum(expansion.is_opaque(node) for node in capture.nodes) == 1
    assert not [node for node in capture.nodes if "scaled_dot_product" in str(node.target)], "inlined nodes remain"


def test_gradients_leave_it_as_it_was():
    with torch.enable_grad():
        (record,) = rewritten(Attention().train(), *same()).records
    assert "torch.no_grad()" in record.reason


def test_function_is_opened():
    assert rewritten(Packed(), rows().transpose(0, 1)).records[0].rewritten
