"""``context_parallel``: models of every way into S2O, over gloo ranks, beside the same model on one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import s2o_compile
from s2o_compile import S2OConfig
from tests.helpers.ranks import check_ranks
from tests.helpers.tiny import TinyAttention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

LENGTH, VOCABULARY = 600, 97
WIDE = 400
"""A window that is longer than the shard of one of two ranks, and shorter than the sequence."""
SHORT = {"min_seq_len": 128, "segment_len": 128, "inner_backend": "eager"}
EXACT = S2OConfig(tau=0.0, **SHORT)


def largest(a, b):
    return (a - b).abs().max().item()


def padding(ids):
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    return mask


def tokens():
    return torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def language_model(kind, implementation, **fields):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **heads, **sizes | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_attn_implementation(implementation)
    return model


def compare_transformers(rank, kind, implementation, method, fields):
    import s2o_compile.transformers
    from s2o_compile.distributed import context_parallel, gather_report

    model, ids = language_model(kind, implementation, **fields), tokens()
    mask = padding(ids)
    if implementation == "s2o":
        s2o_compile.transformers.configure(model, EXACT)
    found = {}
    with torch.no_grad():
        wanted = model(ids).logits
        parallel = context_parallel(model, dist.group.WORLD, EXACT, method=method)
        with s2o_compile.record() as recording:
            output = parallel(ids)
        found["plain"] = largest(output.logits, wanted)
        found["paths"] = {call.path for call in recording.calls}
        found["imbalance"] = gather_report(recording, dist.group.WORLD).imbalance
        found["no cache"] = largest(parallel(ids, use_cache=False).logits, wanted)
        found["last logits"] = largest(parallel(ids, logits_to_keep=3).logits, wanted[:, -3:])
        padded = model(ids, attention_mask=mask).logits
        found["padding"] = largest(
            parallel(ids, attention_mask=mask).logits * mask[..., None], padded * mask[..., None]
        )
        found["short"] = largest(parallel(ids[:, :50]).logits, model(ids[:, :50]).logits)
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        found["generate"] = torch.equal(parallel.generate(ids, **options), model.generate(ids, **options))
        shard = context_parallel(model, dist.group.WORLD, EXACT, gather=False)(ids).logits
        found["shard"] = shard.shape[1] < LENGTH
        packed = {"position_ids": torch.arange(LENGTH)[None] % 100, "use_cache": False}
        found["packed"] = largest(parallel(ids, **packed).logits, model(ids, **packed).logits)
        with torch.inference_mode():
            inside = parallel(ids, attention_mask=mask).logits
            found["inference mode"] = largest(inside * mask[..., None], padded * mask[..., None])
        for name, arguments in {
            "labels": {"labels": ids},
            "position_ids": {"position_ids": torch.arange(LENGTH)[None] % 100.0, "use_cache": False},
            "attention_mask": {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)},
        }.items():
            try:
                parallel(ids, **arguments)
                found[f"refused {name}"] = "not refused"
            except s2o_compile.InputError as error:
                found[f"refused {name}"] = str(error)
    return found


MODELS = {
    "Llama-s2o": (2, "Llama", "s2o", "all_gather", {}),
    "Llama-compiled": (2, "Llama", "sdpa", "all_gather", {}),
    "Llama-compiled-ulysses": (2, "Llama", "sdpa", "ulysses", {"num_hidden_layers": 1}),
    "Mistral-s2o": (4, "Mistral", "s2o", "all_gather", {"sliding_window": 100}),
    "Mistral-window-of-more-than-a-shard": (2, "Mistral", "s2o", "all_gather", {"sliding_window": WIDE}),
    "Mistral-compiled": (2, "Mistral", "sdpa", "all_gather", {"sliding_window": WIDE}),
}


@pytest.mark.parametrize("model", MODELS)
def test_models_of_transformers(model):
    pytest.importorskip("transformers")
    ranks, *rest = MODELS[model]
    for found in check_ranks(compare_transformers, ranks, *rest):
        for name in ("plain", "no cache", "last logits", "padding", "short", "packed", "inference mode"):
            assert found[name] < 1e-5, name
        assert found["paths"] == {"window" if "Mistral" in model else "s2o"}
        assert found["generate"]
        assert found["shard"]
        assert 1.0 <= found["imbalance"] < 1.3
        for name in ("labels", "position_ids", "attention_mask"):
            assert f"context parallel, {name}: expected" in found[f"refused {name}"]


class OwnPositions(nn.Module):
    """Tokens under another name, and positions that are an argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.places, self.layers = nn.Embedding(1024, 32), nn.ModuleList(TinyAttention(32) for _ in range(2))

    def forward(self, x, places=None):
        x = x + self.places(places)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Pooled(OwnPositions):
    def forward(self, x, places=None):
        return super().forward(x, places).mean(1)


class Masked(OwnPositions):
    """An attention whose mask nobody can prove."""

    def forward(self, x, places=None):
        q = (x + self.places(places))[:, None]
        mask = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=(q @ q.mT) > 0)
        return mask[:, 0]


class Convolved(OwnPositions):
    def __init__(self):
        super().__init__()
        self.filter = nn.Conv1d(32, 32, 3)


def compare_own(rank):
    from torch.distributed.device_mesh import init_device_mesh

    from s2o_compile.distributed import context_parallel, gather_report
    from tests.distributed.test_tensor_parallel import Model, tensor_parallel

    found, ways = {}, {"tokens": "x", "positions": "places"}
    config = S2OConfig(tau=0.5, **SHORT)
    x, places = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(5)), torch.arange(LENGTH)[None]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    with torch.no_grad():
        model = OwnPositions().eval()
        with s2o_compile.record() as alone:
            wanted = s2o_compile.optimize(model, config)(x, places)
        parallel = context_parallel(model, mesh["cp"], config, **ways)
        with s2o_compile.record() as recording:
            found["same"] = torch.equal(parallel(x), wanted), largest(parallel(x, places), wanted)
        report = gather_report(recording, mesh["cp"])
        densities = [[site.density for site in each.sites] for each in (report, alone.report)]
        found["densities"] = densities
        found["text"] = str(report)
        found["head_tail"] = largest(context_parallel(model, mesh["cp"], EXACT, order="head_tail", **ways)(x), wanted)
        for kind in (Pooled, Masked, Convolved):
            try:
                context_parallel(kind().eval(), mesh["cp"], config, **ways)(x)
                found[kind.__name__] = "not refused"
            except Exception as error:  # of Dynamo, around that of the backend
                found[kind.__name__] = str(error)
        try:
            context_parallel(model, mesh, config, **ways)
        except s2o_compile.InputError as error:
            found["mesh"] = str(error)
        both = S2OConfig(tau=0.0, dense_heads={"layers.0": (1,)}, **SHORT)
        z = torch.randn(1, LENGTH, 128, generator=torch.Generator().manual_seed(6))
        wanted = s2o_compile.optimize(Model().eval(), both)(z)
        sharded = tensor_parallel(Model().eval(), mesh["tp"], local=True)
        found["2-D"] = largest(context_parallel(sharded, mesh["cp"], both, tokens="x", positions=None)(z), wanted)
    return found


def test_other_models():
    for found in check_ranks(compare_own, 4):
        assert found["same"] == (True, 0.0)
        shared, alone = found["densities"]
        assert shared == pytest.approx(alone)
        assert "max over mean" in found["text"]
        assert "2-D" in found
        assert found["2-D"] < 1e-5
        assert "a number for each of this rank's" in found["Pooled"]
        assert "expected attentions whose masks are proven" in found["Masked"]
        assert "expected attention alone to mix positions" in found["Convolved"]
        assert "a mesh of one dimension" in found["mesh"]
