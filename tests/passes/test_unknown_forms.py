"""Attention in forms that no frontend knows is named, with its reason: in reports, in the status, in the warning."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import s2o_compile
from s2o_compile import NothingRewrittenWarning, S2OConfig
from tests.helpers.capture import Capture, heads

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
N, H, D = 40, 4, 16


def scores(q, k):
    return q @ k.mT / D**0.5


def written_out(q, k):
    e = (scores(q, k) - scores(q, k).amax(-1, keepdim=True)).exp()
    return e / (1 + e.sum(-1, keepdim=True))


def sparsemax(x):
    ordered = x.sort(-1, descending=True).values
    excess, ranks = ordered.cumsum(-1) - 1, torch.arange(1, N + 1, dtype=x.dtype)
    support = (ranks * ordered > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0)


def decay():
    at = torch.arange(N)
    return torch.where(at[:, None] >= at, 0.9 ** (at[:, None] - at).float(), 0.0)


def mix(x, w):
    return torch.einsum("bhij,hg->bgij", x, w)


MIXED, LINEAR, OTHER = "talking heads", "linear attention", "no softmax over the keys between them"
# q, k, v [2, 4, 40, 16] and a parameter [4, 4]
FORMS = {
    "logits-mixed": (MIXED, lambda q, k, v, w: mix(scores(q, k), w).softmax(-1) @ v),
    "both-mixed": (MIXED, lambda q, k, v, w: mix(mix(scores(q, k), w).softmax(-1), w) @ v),
    "probabilities-mixed": ("einsum", lambda q, k, v, w: mix(scores(q, k).softmax(-1), w) @ v),
    "mixed-by-linear": (
        MIXED,
        lambda q, k, v, w: F.linear(scores(q, k).permute(0, 2, 3, 1), w).permute(0, 3, 1, 2).softmax(-1) @ v,
    ),
    "mixed-by-matmul": (MIXED, lambda q, k, v, w: (w @ scores(q, k).flatten(2)).unflatten(-1, (N, N)).softmax(-1) @ v),
    "mixed-by-convolution": ("conv2d", lambda q, k, v, w: F.conv2d(scores(q, k), w[..., None, None]).softmax(-1) @ v),
    "relu": (OTHER, lambda q, k, v, w: scores(q, k).relu() @ v),
    "squared-relu": (OTHER, lambda q, k, v, w: F.relu(scores(q, k)).square() @ v),
    "sigmoid": (OTHER, lambda q, k, v, w: torch.sigmoid(scores(q, k) - 3) @ v),
    "sparsemax": (OTHER, lambda q, k, v, w: sparsemax(scores(q, k)) @ v),
    "off-by-one": ("written by exp", lambda q, k, v, w: written_out(q, k) @ v),
    "log-softmax": ("written by log_softmax", lambda q, k, v, w: scores(q, k).log_softmax(-1).exp() @ v),
    "log-weights": ("written by log_softmax", lambda q, k, v, w: scores(q, k).log_softmax(-1) @ v),
    "softmin": ("written by softmin", lambda q, k, v, w: F.softmin(-scores(q, k), -1) @ v),
    "gumbel": ("gumbel_softmax", lambda q, k, v, w: F.gumbel_softmax(scores(q, k), dim=-1) @ v),
    "written-to-a-buffer": (
        "choose scaled_dot_product_attention",
        lambda q, k, v, w: torch.matmul(scores(q, k).softmax(-1), v, out=torch.empty(v.shape)),
    ),
    "half-of-a-bias": (
        "choose scaled_dot_product_attention",
        lambda q, k, v, w: torch.baddbmm(torch.ones(N, N).tril(), q[0], k[0].mT, beta=0.5).softmax(-1) @ v[0],
    ),
    "added-products": (
        "choose scaled_dot_product_attention",
        lambda q, k, v, w: torch.addmm(torch.ones(N, N).tril(), q[0, 0], k[0, 0].mT).softmax(-1) @ v[0, 0],
    ),
    "added-to-the-output": (
        "choose scaled_dot_product_attention",
        lambda q, k, v, w: torch.addmm(v[0, 0], scores(q, k)[0, 0].softmax(-1), v[0, 0]),
    ),
    "inner": (
        "choose scaled_dot_product_attention",
        lambda q, k, v, w: torch.inner(q[0, 0], k[0, 0]).softmax(-1) @ v[0, 0],
    ),
    "tensordot": (
        "choose scaled_dot_product_attention",
        lambda q, k, v, w: torch.tensordot(torch.tensordot(q[0, 0], k[0, 0], ([1], [1])).softmax(-1), v[0, 0], 1),
    ),
    "keys-first": (LINEAR, lambda q, k, v, w: F.elu(q) @ (F.elu(k).mT @ v)),
    "keys-first-einsum": (
        LINEAR,
        lambda q, k, v, w: torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v)),
    ),
    "retention": (LINEAR, lambda q, k, v, w: (q @ k.mT * decay()) @ v),
    "no-softmax": (LINEAR, lambda q, k, v, w: q @ k.mT @ v),
}


class Mixed(nn.Module):
    """One known attention, and one in another form."""

    def __init__(self, form):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(H, H))

    def forward(self, q, k, v):
        return self.form(F.scaled_dot_product_attention(q, k, v), k, v, self.weight)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_named_once(form):
    why, function = FORMS[form]
    capture = Capture()
    torch.compile(Mixed(function), backend=capture)(heads(), heads(), heads())
    known, unknown = capture.records
    assert (known.rewritten, unknown.rewritten) == (True, False)
    assert why in unknown.reason
    assert {size for shape in (unknown.query_shape, unknown.key_shape) for size in shape} >= {"16"}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_explain_lists_each_once(form):
    report = s2o_compile.explain(Mixed(FORMS[form][1]), heads(), heads(), heads(), config=EXACT)
    assert [site.rewritten for site in report.sites] == [True, False]
    assert report.not_found == ()
    assert "2 attention sites found, 1 rewritten, 1 left dense" in str(report)


@torch.no_grad()
def test_the_status_and_the_warning_name_it():
    class Talking(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H, H))

        def forward(self, q, k, v):
            return mix(scores(q, k), self.weight).softmax(-1) @ v

    fast = s2o_compile.optimize(Talking(), EXACT)
    with pytest.warns(NothingRewrittenWarning, match=r"none of 1 attentions .*talking heads") as said:
        [fast(heads(), heads(), heads()) for _ in range(2)]
    assert len(said) == 1
    ((reason, count),) = s2o_compile.status(fast).left_dense.items()
    assert "talking heads" in reason
    assert count == 1


class Chain(nn.Module):
    """A power of a matrix, of values: a graph network multiplies so, and linear attention does."""

    def forward(self, q, k, v):
        return q @ k.mT @ v


@torch.no_grad()
def test_what_may_be_no_attention_is_named_and_not_counted_as_one(recwarn):
    torch.compile(Chain(), backend="s2o")(heads(), heads(), heads())
    assert not [x.message for x in recwarn if issubclass(x.category, NothingRewrittenWarning)]
    fast = s2o_compile.optimize(Chain(), EXACT)
    with pytest.warns(NothingRewrittenWarning, match="none was found in 1 captured graph"):
        fast(heads(), heads(), heads())
    ((reason, _),) = s2o_compile.status(fast).left_dense.items()
    assert "if this is attention" in reason


def by_experts(q, k, v, w):
    """Weights of an expert, chosen from those of all."""
    experts = w.expand(D, H, H).reshape(4, D, D // 4)[torch.tensor([0, 1])]
    return torch.bmm(torch.bmm(q[:, 0], experts).relu(), experts.mT)


NO_ATTENTION = {
    "experts": by_experts,
    "projections": lambda q, k, v, w: F.linear(F.linear(q.transpose(1, -1), w).relu(), w),
    "similarity": lambda q, k, v, w: (q.mean(-2) @ k.mean(-2).mT).softmax(-1),
    "rotations": lambda q, k, v, w: q[..., :3, :3] @ k[..., :3, :3] @ v[..., :3, :3],
    "scores-of-outputs": lambda q, k, v, w: F.linear(q.transpose(1, 2).flatten(2), torch.ones(8, H * D)).relu(),
}


@torch.no_grad()
@pytest.mark.parametrize("form", NO_ATTENTION)
def test_what_is_no_attention_is_not_named(form):
    capture = Capture()
    torch.compile(Mixed(NO_ATTENTION[form]), backend=capture)(heads(), heads(), heads())
    assert len(capture.records) == 1


class Weights(nn.Module):
    """Two layers whose weights are made of parameters and buffers in some way, behind an attention."""

    def __init__(self, made):
        super().__init__()
        self.made = made
        self.a, self.b = nn.Parameter(torch.randn(32, D)), nn.Parameter(torch.randn(D, 32))
        self.register_buffer("c", torch.randn(32, D))
        self.register_buffer("d", torch.randn(D, 32))

    def forward(self, q):
        first, second = self.made(self)
        x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(0, 2)
        return F.linear(F.linear(x, first).relu(), second)


WEIGHTS = {
    "parameters": lambda m: (m.a, m.b),
    "normalised": lambda m: (F.normalize(m.a, dim=-1), F.normalize(m.b, dim=-1)),
    "rounded": lambda m: tuple((w / w.abs().mean()).round().clamp(-1, 1) * w.abs().mean() for w in (m.a, m.b)),
    "weight-norm": lambda m: (torch._weight_norm(m.a, m.a[:, :1]), torch._weight_norm(m.b, m.b[:, :1])),
    "buffers": lambda m: (m.c, m.d),
    "dequantised": lambda m: (m.c.to(torch.int8) * m.a[:, :1], m.d.to(torch.int8) * m.b[:, :1]),
    "merged": lambda m: (m.a + m.c @ m.d @ m.c, m.b @ m.a @ m.d),
}


@torch.no_grad()
@pytest.mark.parametrize("made", WEIGHTS)
def test_layers_are_no_attention_whatever_their_weights_are_made_of(made):
    report = s2o_compile.explain(Weights(WEIGHTS[made]), heads(), config=EXACT)
    assert [site.rewritten for site in report.sites] == [True]


@pytest.mark.parametrize("made", WEIGHTS)
def test_nor_in_exported_programs(made, recwarn):
    with s2o_compile.record() as recording:
        s2o_compile.export(Weights(WEIGHTS[made]), (heads(),))
    assert [[record.rewritten for record in records] for records in recording.graphs] == [[True]]


@torch.no_grad()
@pytest.mark.parametrize("view", [False, True])
def test_buffers_that_keys_are_written_to_are_no_weights(view):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(2, H, 2 * N, D))

        def forward(self, q, k, v):
            if view:
                self.keys[:, :, :N].copy_(k)
            else:
                self.keys[:, :, :N] = k
            return torch.sigmoid(scores(q, self.keys)) @ torch.cat((v, v), -2)

    (site,) = s2o_compile.explain(Cached(), heads(), heads(), heads(), config=EXACT).sites
    assert OTHER in site.reason


@torch.no_grad()
def test_rotations_by_an_outer_product_are_no_scores():
    """Of as many tokens as a head has dimensions."""

    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.rand(D // 2))

        def forward(self, q, k, v):
            at = torch.arange(D, dtype=torch.float32)[None]
            angles = (self.frequencies[:, None] @ at).mT
            (q, k), cos, sin = (q[..., :D, :], k[..., :D, :]), angles.cos(), angles.sin()
            q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (x.chunk(2, -1) for x in (q, k)))
            return scores(q, k).softmax(-1) @ v[..., :D, :]

    (site,) = s2o_compile.explain(Rotated(), heads(), heads(), heads(), config=EXACT).sites
    assert site.rewritten


@torch.no_grad()
def test_layers_of_softmax_attention_name_nothing_else():
    """The output of one attention is not the scores of the next."""

    class Layer(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.heads, self.qkv, self.out = heads, nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return x + self.out((scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))

    for count in (1, H):
        report = s2o_compile.explain(nn.Sequential(Layer(count), Layer(count)), torch.randn(2, N, H * D), config=EXACT)
        assert [site.name for site in report.sites] == ["0", "1"]
        assert report.rewritten == 2


@torch.no_grad()
def test_one_line_a_module_for_chunks_of_linear_attention():
    def chunked(q, k, v, w):
        parts = [x.split(10, -2) for x in (q, k, v)]
        return torch.cat([a @ (b.mT @ c) for a, b, c in zip(*parts, strict=True)], -2)

    report = s2o_compile.explain(Mixed(chunked), heads(), heads(), heads(), config=EXACT)
    assert len(report.sites) == 2


@torch.no_grad()
def test_in_the_body_of_a_higher_order_operator():
    def branch(q, k, v):
        return torch.sigmoid(scores(q, k)) @ v

    def conditional(q, k, v):
        q, k, v = (x.contiguous() for x in (q, k, v))
        return torch.cond(q.sum() > 0, branch, lambda q, k, v: branch(q, k, v) * 2, (q, k, v))

    capture = Capture()
    torch.compile(conditional, backend=capture)(heads(), heads(), heads())
    assert [record.reason for record in capture.records] == ["it is inside cond, whose body is left as it is"] * 2


@torch.library.custom_op("s2o_tests::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An operator of a user's own."""
    return scores(q, k).softmax(-1) @ v


attend.register_fake(lambda q, k, v: torch.empty_like(q))


@torch.no_grad()
def test_operators_of_users_are_named_by_their_name():
    report = s2o_compile.explain(lambda q: attend(q, q, q), heads(), config=EXACT)
    (site,) = report.sites
    assert "s2o_tests.attend" in site.reason
    assert site.found


@torch.no_grad()
def test_a_failure_of_the_search_fails_nothing(monkeypatch, caplog):
    def broken(*_):
        raise ValueError("broken")

    def conditional(q):
        attended = F.scaled_dot_product_attention(q, q, q)
        return torch.cond(q.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (attended.contiguous(),))

    monkeypatch.setattr("s2o_compile.passes.unknown_forms.find", broken)
    capture = Capture()
    torch.compile(conditional, backend=capture)(heads())
    assert [record.rewritten for record in capture.records] == [True]
    assert "please report that" in caplog.text
