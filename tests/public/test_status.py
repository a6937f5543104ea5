"""status, the account of an optimized model, and the warning of a long call in which nothing ran sparse."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import NothingRewrittenWarning, S2OConfig
from s2o_compile.kernels.core import tuned
from tests.helpers.tiny import TinyAttention, tiny_input, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
LONG = S2OConfig(tau=0.0, min_seq_len=1000, inner_backend="eager")


class Broken(nn.Module):
    """Attention that no graph holds, since a function of the user's forbids its capture."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(32, 32), TinyAttention()

    def forward(self, x):
        return self.attend(self.first(x))

    @torch.compiler.disable
    def attend(self, x):
        return self.attention(x)


class Masked(nn.Module):
    """Attention under a mask that is no causal, sliding or padding mask."""

    def forward(self, q, mask):
        return scaled_dot_product_attention(q, q, q, attn_mask=mask)


def said_by(call):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if warning.category is NothingRewrittenWarning]


@torch.no_grad()
def test_the_account_of_a_sparse_model():
    fast = s2o_compile.optimize(tiny_model(), EXACT)
    assert str(s2o_compile.status(fast)).startswith("NOTHING RAN SPARSE (calls: 0, graphs: 0)")
    with s2o_compile.record() as recording:
        assert said_by(lambda: [fast(tiny_input()) for _ in range(3)]) == []
    fast(tiny_input())
    status = s2o_compile.status(fast)
    assert (status.calls, status.graphs, status.rewritten, status.left_dense) == (4, 1, 2, {})
    assert status.paths == {"s2o": 8}
    assert (recording.status.calls, recording.status.sparse, recording.status.rewritten) == (3, 6, 2)
    assert str(status).startswith("SPARSE (calls: 4, graphs: 1)\nattentions in the graphs: 2 rewritten, 0 left dense")
    assert s2o_compile.status(fast.layers[0]) == status


def test_a_model_without_attention_says_so_once():
    fast = s2o_compile.optimize(nn.Linear(2, 2), S2OConfig(inner_backend="eager"))
    (said,) = said_by(lambda: [fast(torch.ones(1, 2)) for _ in range(3)])
    assert "no attention ran sparse: none was found in 1 captured graph" in said
    assert "docs/troubleshooting.md" in said


def test_graph_breaks_are_named():
    fast = s2o_compile.optimize(Broken().eval(), EXACT)
    (said,) = said_by(lambda: [fast(tiny_input()) for _ in range(2)])
    status = s2o_compile.status(fast)
    (reason,) = status.graph_breaks
    assert f"torch broke the graph ({reason})" in said
    assert "these ran uncompiled: attention" in said
    assert status.uncompiled == ("attention",)
    assert "ran uncompiled, in no graph:\n  - attention" in str(status)
    assert f"graph breaks:\n  - {reason}" in str(status)


def test_short_calls_say_nothing():
    fast = s2o_compile.optimize(Broken().eval(), LONG)
    assert said_by(lambda: fast(tiny_input(999))) == []
    assert len(said_by(lambda: fast(tiny_input(1000)))) == 1
    fast = s2o_compile.optimize(tiny_model(), LONG)
    assert said_by(lambda: fast(tiny_input(999))) == []
    assert s2o_compile.status(fast).paths == {"dense": 2}


def test_a_mask_that_was_read():
    fast = s2o_compile.optimize(Masked(), EXACT)
    mask = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) > 0.5
    (said,) = said_by(lambda: fast(torch.randn(1, 2, 200, 8), mask))
    assert "the masks that were read are no causal, sliding or padding masks" in said
    assert s2o_compile.status(fast).paths == {"masked": 1}


class Pictures(nn.Module):
    """A model whose ``generate`` calls an image tower by itself, as those of transformers do."""

    class Tower(Masked):
        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

    def __init__(self):
        super().__init__()
        self.tower, self.text = self.Tower(), Broken()

    def forward(self, x):
        return self.text(x)


def test_an_image_tower_does_not_speak_for_the_model():
    """Its warning was said of the model, and the model's own was not said any more."""
    fast = s2o_compile.optimize(Pictures().eval(), EXACT)
    mask = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) > 0.5
    (said,) = said_by(lambda: [fast.tower(torch.randn(1, 2, 200, 8), mask) for _ in range(2)])
    assert said.startswith("tower, a part of an optimized model, was called, and no attention ran sparse: the masks")
    (said,) = said_by(lambda: [fast(tiny_input()) for _ in range(2)])
    assert said.startswith("an optimized model was called, and no attention ran sparse: none was found")


def test_masks_that_were_read_beside_short_attention():
    class Both(Masked):
        def forward(self, q, mask):
            short = q[:, :, :100]
            return super().forward(q, mask)[:, :, :100] + scaled_dot_product_attention(short, short, short)

    fast = s2o_compile.optimize(Both(), EXACT)
    mask = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) > 0.5
    (said,) = said_by(lambda: fast(torch.randn(1, 2, 200, 8), mask))
    assert "padding masks, and other attentions were short or marked dense. s2o_compile.explain" in said


def test_attention_that_stays_dense_is_said_once():
    """The reasons are said while it compiles."""
    fast = s2o_compile.optimize(tiny_model(), EXACT)
    with torch.enable_grad():
        assert said_by(lambda: [fast.double()(tiny_input().double()) for _ in range(2)]) != []
    status = s2o_compile.status(fast)
    assert sum(status.left_dense.values()) == 2
    assert "left dense:\n  - 2 x " in str(status)


@torch.no_grad()
def test_a_model_is_heard_that_dynamo_does_not_compile():
    fast = s2o_compile.optimize(tiny_model(), EXACT)
    with torch.compiler.set_stance("force_eager"):
        (said,) = said_by(lambda: fast(tiny_input()))
    assert "these ran uncompiled: the model itself" in said


@torch.no_grad()
def test_a_model_is_heard_that_is_recompiled_too_often():
    """Dynamo gives up at its limit; it was sparse before."""
    fast = s2o_compile.optimize(tiny_model(), EXACT, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert said_by(lambda: fast(tiny_input(200))) == []
        (said,) = said_by(lambda: [fast(tiny_input(length)) for length in (201, 202)])
    assert "no attention ran sparse: these ran uncompiled: the model itself" in said


def test_status_of_something_else():
    with pytest.raises(TypeError, match=r"status: expected the result of s2o_compile.optimize, got TinyModel"):
        s2o_compile.status(tiny_model())


@torch.no_grad()
def test_every_thread_counts():
    fast, x = s2o_compile.optimize(tiny_model(), EXACT), tiny_input()
    fast(x)

    def work(_):
        with torch.no_grad():
            for _ in range(20):
                fast(x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    status = s2o_compile.status(fast)
    assert status.calls == 81
    assert status.sparse == 162


@torch.no_grad()
def test_a_call_is_sparse_while_another_thread_compiles():
    """torch says of the whole process that it is compiling."""
    fast, x = s2o_compile.optimize(tiny_model(), EXACT), tiny_input()
    fast(x)

    def backend(gm, _):
        def work():
            with torch.no_grad():
                fast(x)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(x)
    assert s2o_compile.status(fast).sparse == 4


@torch.no_grad()
def test_a_dtype_that_never_pays_is_named(monkeypatch):
    """Else a user believes that long calls are sparse; short ones are silent, and a length that is given is obeyed."""
    monkeypatch.setattr(tuned, "LONG", 1000)
    for kind in ("cpu in C++ with AMX", "cpu in C++"):
        monkeypatch.setitem(tuned.BUILT_IN, kind, tuned.Entry(crossovers={torch.bfloat16: tuned.NEVER}))
    tuned.forget()
    reason = (
        "bfloat16 on this CPU: SDPA is faster at any length; S2OConfig(min_seq_len=1000) runs it sparse all the same"
    )
    model, (long, short) = tiny_model().bfloat16(), (tiny_input(length).bfloat16() for length in (1000, 999))
    fast = s2o_compile.optimize(model, S2OConfig(inner_backend="eager"))
    assert said_by(lambda: fast(short)) == []
    assert s2o_compile.status(fast).never == {}
    (said,) = said_by(lambda: [fast(long), fast(long)])
    assert f"no attention ran sparse: {reason}." in said
    assert s2o_compile.status(fast).never == {reason: 4}
    assert f"dense at any length:\n  - 4 x {reason}" in str(s2o_compile.status(fast))
    assert f"ran dense ({reason})" in str(s2o_compile.explain(model, long, config=S2OConfig(inner_backend="eager")))
    obeyed = s2o_compile.optimize(model, S2OConfig(min_seq_len=1000, inner_backend="eager"))
    obeyed(long)
    assert s2o_compile.status(obeyed).paths == {"s2o": 2}
    tuned.forget()


@torch.no_grad()
@pytest.mark.parametrize("how", ["recompilations", "stance"])
def test_a_compiled_model_that_runs_uncompiled_later_is_heard(how):
    """Short calls use Dynamo's recompilations up; the first long call is dense, in a model without modules of parts."""
    fast = s2o_compile.optimize(TinyAttention().eval(), LONG, dynamic=False)
    if how == "recompilations":
        with torch._dynamo.config.patch(recompile_limit=2):
            assert said_by(lambda: [fast(tiny_input(length)) for length in (200, 201, 202)]) == []
            (said,) = said_by(lambda: [fast(tiny_input(1000)) for _ in range(2)])
    else:
        fast(tiny_input(200))
        with torch.compiler.set_stance("force_eager"):
            (said,) = said_by(lambda: [fast(tiny_input(1000)) for _ in range(2)])
    assert "these ran uncompiled: the model itself (torch compiled it before" in said
    assert "optimize(model, dynamic=True)" in said
    status = s2o_compile.status(fast)
    assert (status.uncompiled, status.uncompiled_calls) == (("",), 3 if how == "recompilations" else 2)
    assert f", uncompiled calls: {status.uncompiled_calls})" in str(status)
    assert "ran uncompiled, in no graph:\n  - the model itself" in str(status)


@torch.no_grad()
def test_a_sparse_status_names_the_calls_that_ran_uncompiled():
    fast = s2o_compile.optimize(tiny_model(), EXACT)
    fast(tiny_input())
    with torch.compiler.set_stance("force_eager"):
        assert len(said_by(lambda: fast(tiny_input()))) == 1
    status = s2o_compile.status(fast)
    assert (status.sparse, status.calls, status.uncompiled_calls) == (2, 2, 1)
    assert status.uncompiled == ("", "layers.0", "layers.1")


class Breaking(nn.Sequential):
    """Attention behind a graph break where Dynamo cannot go on: it leaves the whole forward to Python."""

    def forward(self, x):
        try:
            torch._dynamo.graph_break()
            return scaled_dot_product_attention(x, x, x)
        except ValueError:
            return x


@torch.no_grad()
def test_a_sparse_status_names_a_part_that_dynamo_leaves_to_python():
    fast = s2o_compile.optimize(
        nn.Sequential(TinyAttention(), Breaking(nn.ReLU()), nn.Sequential(nn.ReLU())).eval(), EXACT
    )
    fast(tiny_input())
    status = s2o_compile.status(fast)
    assert (status.paths, status.left_dense, status.uncompiled) == ({"s2o": 1}, {}, ("1",))
    assert "ran uncompiled, in no graph:\n  - 1" in str(status)
    assert status.uncompiled_calls == 0


@torch.no_grad()
@pytest.mark.parametrize("container", [lambda part: nn.ModuleDict({"0": part}), lambda part: nn.ModuleList([part])])
def test_a_container_has_an_account(container):
    fast = s2o_compile.optimize(container(TinyAttention().eval()), EXACT)
    other = copy.deepcopy(fast)
    (part,) = fast.children()
    part(tiny_input())
    assert s2o_compile.status(fast).paths == {"s2o": 1}
    assert s2o_compile.status(other).calls == 0


def test_a_model_that_was_never_called_says_what_to_call():
    fast = s2o_compile.optimize(tiny_model(), EXACT)
    assert "never called: call the model that optimize returned" in str(s2o_compile.status(fast))


@torch.no_grad()
def test_a_report_tells_graphs_of_one_site_apart_by_their_lengths():
    fast = s2o_compile.optimize(tiny_model(), LONG)
    with s2o_compile.record() as recording:
        for length in (1000, 200, 210):
            fast(tiny_input(length))
    long, _, short, _ = recording.report.sites
    assert (long.name, long.path, long.result) == ("layers.0", "s2o", "rewritten")
    assert (short.name, short.path, short.result) == ("layers.0", "dense", "rewritten, ran dense (short)")
    assert (short.density, short.error) == (1.0, None)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_that_keeps_its_functions_is_counted(inner):
    """It runs without the operator: dense where nothing compiles its graph, which the warning says."""
    distances = torch.linspace(0.1, 1.0, 2)

    class Alibi(nn.Module):
        def forward(self, q):
            return flex_attention(q, q, q, lambda score, b, h, i, j: score - distances[h] * (i - j).abs())

    fast = s2o_compile.optimize(Alibi(), S2OConfig(tau=0.5, error=None, min_seq_len=0, inner_backend=inner))
    said = said_by(lambda: [fast(torch.randn(1, 2, 256, 16)) for _ in range(2)])
    status = s2o_compile.status(fast)
    assert status.rewritten == 1
    if inner == "eager":
        assert status.paths == {"dense": 2}
        assert 'choose another inner_backend than "eager"' in said[0]
        assert "dense at any length:\n  - 2 x FlexAttention with functions of its own" in str(status)
    else:
        assert (status.paths, said) == ({"s2o": 2}, [])
