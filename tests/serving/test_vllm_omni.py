"""The kernel of vllm-omni's SPARSE_ATTN, called as its dispatcher calls it."""

from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from s2o_compile import InputError, OptionError, S2OConfig
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.serving import vllm_omni
from tests.conftest import Case, bounds, distance, exact_attention

EXACT = {"tau": 0.0, "min_seq_len": 0}


class Dispatcher:
    """What of vllm-omni's implementation meets a kernel: its name, its static params, its capabilities, its call.

    Written anew from ``vllm_omni/diffusion/attention/backends/sparse_attn.py`` of vllm-omni's commit ef4a8b5886. No
    release up to 0.30.0 has that file.
    """

    def __init__(self, softmax_scale, causal=False, **backend_kwargs):
        assert backend_kwargs.pop("backend") == "s2o"
        point = EntryPoint("s2o", "s2o_compile.serving.vllm_omni:attn_fn", "vllm_omni.sparse_attn")
        self.kernel, self.params = point.load(), dict(backend_kwargs.get("params", backend_kwargs))
        self.softmax_scale, self.causal = softmax_scale, causal
        self.capabilities = getattr(self.kernel, "capabilities", {})

    def forward(self, query, key, value, *, attn_mask=None, full_attn_spans=None, **published):
        params = {name: value for name, value in {**self.params, **published}.items() if value is not None}
        if attn_mask is not None:
            assert self.capabilities.get("supports_attention_mask")
            params["attn_mask"] = attn_mask
        if full_attn_spans is not None:
            if not self.capabilities.get("supports_full_attn_spans"):
                raise ValueError("received full_attn_spans")
            params["full_attn_spans"] = full_attn_spans
        return self.kernel(query, key, value, params, is_causal=self.causal, softmax_scale=self.softmax_scale)


@pytest.fixture(autouse=True)
def fresh():
    vllm_omni._config.cache_clear()
    yield
    vllm_omni._config.cache_clear()


def served(inputs, params=EXACT, **given):
    """Output [B, H, N, D] and the operator's calls."""
    dispatcher = Dispatcher(inputs.scale, inputs.mask.causal, backend="s2o", params=params)
    tensors = [x.transpose(1, 2).contiguous() for x in inputs.tensors]
    with record_calls() as calls:
        output = dispatcher.forward(*tensors, **given)
    assert output.shape == tensors[0].shape
    return output.transpose(1, 2), [(call.path, call.mask) for call in calls]


CASES = {
    "bidirectional": Case(queries=300, heads=4, kv_heads=4, head_dim=32, causal=False),
    "grouped": Case(queries=300, heads=4, kv_heads=2, head_dim=32, causal=False),
    "causal": Case(queries=300, heads=2, kv_heads=2, head_dim=32, causal=True),
    "causal-longer-keys": Case(queries=300, keys=400, heads=2, kv_heads=2, head_dim=32, causal=True, offset=0),
    "batch-of-two": Case(batch=2, queries=260, heads=2, kv_heads=2, head_dim=16, causal=False),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_attention(name):
    inputs = CASES[name].inputs()
    output, calls = served(inputs, latent_shape=torch.tensor([[3, 10, 10]]), step=4)
    assert distance(output, exact_attention(inputs)[0]) <= bounds(inputs)[0]
    assert [path for path, _ in calls] == ["s2o"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding_of_ranks_is_a_key_mask(dtype):
    inputs = Case(batch=2, queries=280, heads=2, kv_heads=2, head_dim=16, causal=False, padding="right").inputs()
    output, calls = served(inputs, attn_mask=inputs.mask.key_mask.to(dtype))
    assert distance(output, exact_attention(inputs)[0]) <= bounds(inputs)[0]
    assert [path for path, _ in calls] == ["s2o"]


def test_keys_behind_the_valid_ones_are_not_seen():
    inputs = Case(queries=300, keys=280, heads=2, kv_heads=2, head_dim=16, causal=False).inputs()
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 20), value=torch.nan) for x in inputs.tensors[1:]]
    output, calls = served(replace(inputs, key=padded[0], value=padded[1]), valid_kv_length=280)
    assert distance(output, exact_attention(inputs)[0]) <= bounds(inputs)[0]
    assert [path for path, _ in calls] == ["s2o"]


def test_a_padded_request_of_a_packed_model_is_one_document():
    """As MiniMax-H3 calls it: lengths of [real, pad], and a mask that holds both."""
    inputs = Case(queries=300, keys=260, heads=2, kv_heads=2, head_dim=16, causal=False).inputs()
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 40), value=torch.nan) for x in inputs.tensors[1:]]
    lengths = {"cu_seqlens_q": torch.tensor([0, 260, 300]), "max_seqlen_q": 260, "valid_kv_length": 260}
    for mask in ({}, {"attn_mask": torch.arange(300)[None] < 260}, {"attn_mask": torch.ones(1, 300, dtype=torch.bool)}):
        output, calls = served(replace(inputs, key=padded[0], value=padded[1]), **lengths, **mask)
        assert distance(output, exact_attention(inputs)[0]) <= bounds(inputs)[0]
        assert [path for path, _ in calls] == ["s2o"]


@pytest.mark.parametrize("given", [999, -40, 0, [260], 2.5], ids=str)
def test_valid_keys_are_a_number_of_keys(given):
    with pytest.raises(InputError, match="valid_kv_length: expected a number of keys, 1 to 300, got"):
        served(CASES["bidirectional"].inputs(), valid_kv_length=given)


def test_a_mask_by_pairs_is_read():
    inputs = Case(queries=280, heads=2, kv_heads=2, head_dim=16, causal=False).inputs()
    seen = torch.rand(280, 280, generator=torch.Generator().manual_seed(0)) < 0.5
    output, calls = served(inputs, attn_mask=seen[None, None])
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs.tensors, attn_mask=seen, scale=inputs.scale)
    torch.testing.assert_close(output, expected)
    assert [path for path, _ in calls] == ["masked"]


def test_short_sequences_are_dense():
    inputs = CASES["bidirectional"].inputs()
    assert served(inputs, {"tau": 0.0, "min_seq_len": 1000})[1] == [("dense", "bidirectional")]


def test_what_it_cannot_hold_is_refused():
    inputs = CASES["causal"].inputs()
    with pytest.raises(InputError, match=r"attn_mask: expected padding .* beside is_causal"):
        served(inputs, attn_mask=torch.ones(300, 300, dtype=torch.bool)[None, None])
    with pytest.raises(ValueError, match="full_attn_spans"):
        served(inputs, full_attn_spans=[[(0, 9)]])
    with pytest.raises(InputError, match="full_attn_spans: expected a mask"):
        vllm_omni.attn_fn(*inputs.tensors, {"full_attn_spans": [[(0, 9)]]}, True, 1.0)
    with pytest.raises(InputError, match=r"cu_seqlens_q: expected one document.* got packed sequences"):
        served(inputs, cu_seqlens_q=torch.tensor([0, 200, 300]), cu_seqlens_k=torch.tensor([0, 200, 300]))
    with pytest.raises(InputError, match="cu_seqlens_q: expected one document"):
        served(inputs, cu_seqlens_q=torch.tensor([0, 200, 300]), max_seqlen_q=200, valid_kv_length=300)


def test_params_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("S2O_ERROR", "0.1")
    assert vllm_omni._config(()) == S2OConfig(error=0.1)
    assert vllm_omni._config((("tau", 0.25),)) == S2OConfig(tau=0.25)
    assert vllm_omni._config((("error", 0.02), ("min_seq_len", 9))) == S2OConfig(error=0.02, min_seq_len=9)
    with pytest.raises(OptionError, match="tau: expected a finite number"):
        served(CASES["causal"].inputs(), {"tau": "much"})


def test_params_of_a_json_file():
    case = Case(heads=2, kv_heads=2, queries=300, head_dim=16)
    query, key, value = (x.transpose(1, 2) for x in case.inputs().tensors)
    for taus in ([0.0, 0.5], (0.0, 0.5)):
        vllm_omni.attn_fn(query, key, value, {"tau": taus, "min_seq_len": 0}, False, 0.25)
    with pytest.raises(OptionError, match="tau: expected a finite number"):
        vllm_omni.attn_fn(query, key, value, {"tau": {"0": 0.5}}, False, 0.25)
