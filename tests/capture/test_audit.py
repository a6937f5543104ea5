"""The audit counts what really runs, once each, and explain names what the pass did not find."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.capture import audit as audit
from s2o_compile.passes.site import SiteRecord
from tests.helpers.tiny import TinyAttention, tiny_input, tiny_model

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
EXACT = S2OConfig(tau=0.0, min_seq_len=0)


def qkv(length=12, heads=2, dim=8):
    return tuple(torch.randn(1, heads, length, dim) for _ in range(3))


def counted(fn, *args, **kwargs):
    with torch.no_grad():
        return audit.take(fn, args, kwargs)


FORMS = {
    "matmul-chain": lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.mT) / 8**0.5, dim=-1), v),
    "operators": lambda q, k, v: (q @ k.mT).masked_fill(~torch.ones(12, 12).bool().tril(), -1e9).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1).to(v.dtype), v
    ),
    "baddbmm": lambda q, k, v: torch.bmm(
        F.dropout(torch.baddbmm(torch.zeros(2, 12, 12), q[0], k[0].mT, beta=1.0, alpha=0.3).softmax(-1), 0.1),
        v[0],
    ),
    "sinks": lambda q, k, v: torch.cat([q @ k.mT, torch.zeros(1, 2, 12, 1)], -1).softmax(-1)[..., :-1] @ v,
    "softcap": lambda q, k, v: torch.tanh(q @ k.mT / 30).mul(30).add(0.0).softmax(-1, torch.float32) @ v,
    "grouped": lambda q, k, v: (q[:, :, None] @ k[:, :, None].mT).softmax(-1) @ v[:, :, None],
    "one-key-head": lambda q, k, v: torch.einsum(
        "bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
    "ellipsis": lambda q, k, v: torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd", q, k).softmax(-1), v),
    "sinks-first": lambda q, k, v: torch.cat([torch.zeros(1, 2, 12, 1), q @ k.mT], -1).softmax(-1)[..., 1:] @ v,
    "nan-to-num": lambda q, k, v: (q @ k.mT).softmax(-1).nan_to_num() @ v,
    "by-hand": lambda q, k, v: (lambda e: e / e.sum(-1, keepdim=True))((q @ k.mT).exp()) @ v,
    "log-softmax": lambda q, k, v: torch.log_softmax(q @ k.mT, -1).exp() @ v,
    "values-first": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_attention(form):
    (ran,) = counted(FORMS[form], *qkv())
    assert ran.kind == audit.HAND_WRITTEN
    keys = "13" if "sinks" in form else "12"
    assert ran.query_shape[-2:] == ("12", "8")
    assert ran.key_shape[-2:] == (keys, "8")


class Mixer(nn.Module):
    """Tokens are merged by weights that a projection gives, in another dtype: no queries meet keys."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))

    def forward(self, x):
        return F.linear(x, self.weights.float()).mT.softmax(-1) @ x


def test_mixing_without_queries_and_keys_is_another_kind():
    (ran,) = counted(Mixer(), torch.randn(2, 12, 8))
    assert ran.kind == audit.MIXING
    assert "no product of queries and keys" in ran.reason


def test_scores_copied_into_a_larger_tensor_are_scores():
    def chunked(q, k, v):
        scores = q.new_zeros(1, 2, 12, 12)
        for start in (0, 6):
            scores[:, :, start : start + 6].copy_(q[:, :, start : start + 6] @ k.mT)
        return scores.transpose(1, 2).softmax(-1).transpose(1, 2) @ v

    (ran,) = counted(chunked, *qkv())
    assert ran.kind == audit.HAND_WRITTEN


@pytest.mark.parametrize("need_weights", [False, True], ids=["no-weights", "weights"])
def test_a_module_without_parent_is_found_by_its_record(need_weights):
    module, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(1, 12, 32)
    with torch.no_grad():
        report = s2o_compile.explain(module, x, x, x, need_weights=need_weights)
    assert [len(report.sites), len(report.not_found)] == [1, 0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("value_dim", [8, 4])
def test_sdpa_is_counted_once_whatever_kernel_it_takes(dropout, value_dim):
    q, k, v = qkv()
    assert len(counted(F.scaled_dot_product_attention, q, k, v[..., :value_dim], None, dropout)) == 1


def test_flex_attention():
    (ran,) = counted(flex_attention, *qkv(length=128))
    assert ran.kind == "flex_attention"


def router(x):
    weights, experts = (x @ torch.ones(8, 4)).softmax(-1).topk(2)
    return (x[..., None] * weights[..., None, :]).sum(-1) + experts.sum()


OTHERS = {
    "router": router,
    "classifier": lambda x: F.linear(x, torch.ones(4, 8)).softmax(-1),
    "distribution": lambda x: x.softmax(-1) @ nn.Parameter(torch.arange(8.0)[:, None]),
    "over-queries": lambda x: (x @ x.mT).softmax(-2) @ x,
    "linear": nn.Linear(8, 8),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention_is_not_counted(name):
    assert counted(OTHERS[name], torch.randn(2, 12, 8)) == ()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["no-weights", "weights"])
def test_multihead_attention_is_counted_once(training, need_weights):
    x = torch.randn(1, 12, 32)
    module = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True).train(training)
    assert len(counted(module, x, x, x, need_weights=need_weights)) == 1


@pytest.mark.parametrize("training", [False, True], ids=["fast-path", "train"])
def test_transformer_encoder_is_counted_by_layer(training):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2).train(training)
    ran = counted(encoder, torch.randn(1, 12, 32))
    assert [r.path.split(".")[:2] for r in ran] == [["layers", "0"], ["layers", "1"]]
    assert all(("_transformer_encoder_layer_fwd" in r.kind) != training for r in ran)


def test_paths_and_counts_of_a_shared_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = TinyAttention()

        def forward(self, x):
            return self.block(self.block(x))

    assert [ran.path for ran in counted(Twice(), tiny_input())] == ["block", "block"]


class Stateful(nn.Module):
    """Counts its calls, moves a buffer, fills a cache that it is given, and draws random numbers."""

    def __init__(self, lock=None):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.norm = nn.BatchNorm1d(8)
        self.lock = lock

    def forward(self, x, cache):
        self.steps += 1
        cache.append(self.norm(x[0, 0]))
        return F.dropout(F.scaled_dot_product_attention(x, x, x), 0.5) + random.random()


@pytest.mark.parametrize("copyable", [True, False], ids=["copied", "original"])
def test_the_extra_run_leaves_no_trace(copyable):
    class NoCopy:
        def __deepcopy__(self, memo):
            raise TypeError("a lock")

    model, cache = Stateful(None if copyable else NoCopy()).train(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    assert len(counted(model, qkv()[0], cache)) == 1
    drawn = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)
    qkv()
    assert drawn == (torch.rand(1), random.random())
    assert cache == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inputs_with_a_history_can_be_copied():
    x = torch.randn(1, 2, 12, 8, requires_grad=True) * 2
    assert len(audit.take(F.scaled_dot_product_attention, (x, x, x), {})) == 1


def hidden(module):
    """A model whose attention Dynamo never sees."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.inner = TinyAttention(), module

        def forward(self, x):
            return torch._dynamo.disable(self.inner)(self.seen(x))

    return Hidden().eval()


def test_explain_names_what_hides_behind_disable():
    with torch.no_grad():
        report = s2o_compile.explain(hidden(tiny_model()), tiny_input(), config=EXACT)
    assert [site.name for site in report.sites if site.found] == ["seen"]
    assert report.audit_error == ""
    assert [site.name for site in report.not_found] == ["inner.layers.0", "inner.layers.1"]
    assert all(
        not site.rewritten and "scaled_dot_product_attention ran here" in site.reason for site in report.not_found
    )
    text = str(report)
    assert "1 attention sites found, 1 rewritten, 0 left dense" in text
    assert "NOT FOUND: 2 more ran" in text
    assert "breaks:" in text


def test_explain_counts_calls_and_not_only_modules():
    class Both(nn.Module):
        def forward(self, x):
            y = F.scaled_dot_product_attention(x, x, x)
            return torch._dynamo.disable(F.scaled_dot_product_attention)(y, x, x)

    with torch.no_grad():
        report = s2o_compile.explain(Both(), qkv(length=150)[0], config=EXACT)
    assert [site.found for site in report.sites] == [True, False]


def test_a_graph_that_layers_share_covers_all_of_them():
    class Layer(TinyAttention):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model = nn.Sequential(*(Layer() for _ in range(3))).eval()
    with torch.no_grad():
        report = s2o_compile.explain(model, tiny_input(), config=EXACT)
    assert report.rewritten >= 1
    assert report.not_found == ()


def test_explain_finds_everything_in_a_plain_model():
    with torch.no_grad():
        report = s2o_compile.explain(tiny_model(), tiny_input(), config=EXACT)
    assert report.not_found == ()
    assert report.audit_error == ""
    assert report.pass_seconds > 0
    assert report.compile_seconds is None
    assert "passes: " in str(report)


def test_a_model_that_the_audit_cannot_run_is_still_explained():
    def touchy(x):
        if torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(x, x, x)
        raise RuntimeError("only compiled")

    with torch.no_grad():
        report = s2o_compile.explain(touchy, qkv(length=150)[0], config=EXACT)
    assert report.rewritten == 1
    assert "RuntimeError: only compiled" in str(report)


def test_a_recorded_compilation_knows_the_share_of_the_passes():
    with torch.no_grad(), s2o_compile.record() as recording:
        s2o_compile.optimize(tiny_model())(tiny_input())
    report = recording.report
    assert 0 < report.pass_seconds < report.compile_seconds
    assert "of compiling" in str(report)


def test_cover_matches_paths_before_shapes():
    def ran(path):
        return audit.Ran(path, audit.SDPA, ("1", "2", "12", "8"), ("1", "2", "12", "8"), "float32")

    def site(name):
        return SiteRecord(name=name, rewritten=True, query_shape=("1", "2", "s7", "8"), key_shape=("1", "1", "s7", "8"))

    calls = [ran("a.attn"), ran("b.attn"), ran("b.attn")]
    first, second, other = site("b.attn"), site("b.attn#2"), site("other")
    assert audit.cover(calls, [(first, 1), (second, 1)]) == (None, first, second)
    assert audit.cover(calls, [(site("attn"), 3)]) == (site("attn"),) * 3
    assert audit.cover(calls, [(other, 2)]) == (other, other, None)
    assert audit.cover(calls, []) == (None,) * 3
    prefill = SiteRecord(
        name="b.attn", rewritten=True, query_shape=("1", "2", "12", "8"), key_shape=("1", "1", "12", "8")
    )
    decode = SiteRecord(
        name="b.attn", rewritten=False, query_shape=("1", "2", "1", "8"), key_shape=("1", "1", "13", "8")
    )
    assert audit.cover(calls[1:2], [(decode, 1), (prefill, 1)]) == (prefill,)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestNestedTensors:
    """Tensors whose entries differ in length: torch's encoder makes some of padded input, and others have no shape."""

    def test_an_encoder_with_padding(self):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
        x, padding = tiny_input(batch=2), torch.zeros(2, 200, dtype=torch.bool)
        padding[0, 150:] = True
        ran = counted(encoder, x, src_key_padding_mask=padding)
        expected = [(f"layers.{i}.self_attn", ("2", "?", "32")) for i in range(2)]
        assert [(call.path, call.query_shape) for call in ran] == expected
        with torch.no_grad():
            report = s2o_compile.explain(encoder, x, src_key_padding_mask=padding, config=EXACT)
        assert (report.rewritten, len(report.sites), report.audit_error) == (2, 2, "")

    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
    def test_inputs_of_attention(self, layout):
        nested = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (15, 20)], layout=layout)
        heads_first = nested.transpose(1, 2)
        heads_first = heads_first.contiguous() if layout is torch.strided else heads_first
        (ran,) = counted(F.scaled_dot_product_attention, *[heads_first] * 3)
        assert ran.query_shape == ("2", "2", "?", "8")
