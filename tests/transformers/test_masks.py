"""The masks under set_attn_implementation("s2o"): what is proven of them, what they hold, and who writes into them."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from s2o_compile.transformers import configure, s2o_attention_forward
from s2o_compile.transformers.lazy_mask import LazyMask
from tests.helpers.tiny_transformers import CAUSAL, EXACT, LENGTH, described, tiny

POSITIONS = torch.stack([torch.cat([torch.arange(n), torch.arange(5, LENGTH - n + 5)]) for n in (120, 30)])
IDS = (POSITIONS.diff(prepend=POSITIONS[:, :1] - 1, dim=-1) != 1).cumsum(-1)


THREE = torch.arange(3).repeat_interleave(torch.tensor([60, 60, LENGTH - 120])).expand(2, -1)
RESTARTS = torch.arange(LENGTH) - 60 * THREE
BYTES = (7 - THREE % 2).to(torch.uint8)


def packed(function, ids=IDS, positions=POSITIONS, *, remapped=False):
    """The mask function of packed sequences; ``remapped``, as transformers 5.24 makes it, over their own positions."""

    def over_positions(b, h, q, k):
        return function(b, h, positions[b, q], positions[b, k])

    documents = masking_utils.packed_sequence_mask_function(ids)
    return masking_utils.and_masks(over_positions if remapped else function, documents)


def searched(b, h, q, k):
    ends = torch.tensor([70, 150])
    return torch.bucketize(q, ends, right=True) == torch.bucketize(k, ends, right=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "causal"),
        ({"q_offset": 60, "kv_length": 260}, "causal"),
        ({"q_offset": torch.tensor(60), "kv_length": 300}, "causal, offset 60"),
        ({"q_offset": 60, "kv_offset": 20, "kv_length": 240}, "causal"),
        ({"mask_function": masking_utils.bidirectional_mask_function, "kv_length": 90}, "bidirectional"),
        (
            {"mask_function": masking_utils.sliding_window_bidirectional_mask_function(16)},
            "sliding window -16..+16",
        ),
        ({"mask_function": lambda b, h, q, k: (k <= q + 3) & (q - k < 50)}, "sliding window -49..+3"),
        ({"mask_function": masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k > q - 9)}, "causal, window 9"),
        (
            {"mask_function": masking_utils.chunked_causal_mask_function(150, torch.zeros(2, dtype=torch.long))},
            "causal, chunk 150",
        ),
        ({"attention_mask": torch.ones(2, LENGTH, dtype=torch.bool)}, "causal"),
        ({"attention_mask": torch.arange(LENGTH).expand(2, -1) > 3}, "causal, key padding"),
        ({"attention_mask": torch.ones(2, 150, dtype=torch.bool)}, "causal, key padding"),
        ({"attention_mask": torch.arange(240).expand(2, -1) > 30, "kv_offset": 20, "q_offset": 20}, None),
        ({"mask_function": packed(CAUSAL)}, "packed causal"),
        ({"mask_function": packed(CAUSAL, remapped=True)}, "packed causal"),
        ({"mask_function": packed(masking_utils.sliding_window_causal_mask_function(9))}, "packed causal, window 9"),
        (
            {"mask_function": packed(masking_utils.sliding_window_causal_mask_function(9), remapped=True)},
            "packed causal, window 9",
        ),
        ({"mask_function": packed(masking_utils.bidirectional_mask_function)}, "packed bidirectional"),
        ({"mask_function": packed(CAUSAL), "attention_mask": torch.arange(LENGTH).expand(2, -1) > 3}, None),
        ({"mask_function": masking_utils.and_masks(CAUSAL, searched)}, "packed causal"),
        ({"mask_function": packed(CAUSAL), "q_length": 120}, "packed causal, offset 0"),
        ({"mask_function": packed(CAUSAL), "q_length": 120, "q_offset": 20, "kv_offset": 20, "kv_length": 160}, None),
        ({"mask_function": packed(CAUSAL, ids=IDS.repeat(2, 1))}, "packed causal"),
    ],
)  # fmt: skip
def test_what_is_proven_is_the_mask_that_transformers_makes(arguments, text):
    mask = described(**arguments)
    proven = mask.proven
    queries, keys = mask.shape[2:]
    if proven.documents is None:
        pairs = proven.mask.visible_pairs(queries, keys, torch.device("cpu"))
    else:
        pairs = proven.documents.visible(proven.mask)
    assert torch.equal(pairs.expand(mask.shape), mask.made)
    if text is not None:
        assert (proven.documents is not None) == text.startswith("packed ")
        assert proven.mask.text(queries, keys) == text.removeprefix("packed ")


TABLE = torch.arange(LENGTH) % 7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mask_function": masking_utils.or_masks(CAUSAL, lambda b, h, q, k: k < 9)}, "union"),
        ({"mask_function": packed(CAUSAL, positions=POSITIONS.flip(-1), remapped=True)}, "varies along queries"),
        ({"mask_function": packed(CAUSAL, ids=IDS * 0, remapped=True)}, "varies along queries"),
        ({"mask_function": packed(CAUSAL, ids=IDS % 2 + (POSITIONS > 60), remapped=True)}, "varies along queries"),
        ({"mask_function": packed(CAUSAL, ids=THREE % 2, positions=RESTARTS, remapped=True)}, "varies along queries"),
        ({"mask_function": packed(CAUSAL, ids=THREE != 1, positions=RESTARTS, remapped=True)}, "varies along queries"),
        ({"mask_function": packed(CAUSAL, ids=BYTES, positions=RESTARTS, remapped=True)}, "varies along queries"),
        ({"mask_function": packed(CAUSAL, ids=IDS.double())}, "NaN"),
        ({"mask_function": lambda b, h, q, k: TABLE[q] >= TABLE[k]}, "not"),
        ({"mask_function": lambda b, h, q, k: (k <= q) & (k != 5)}, "looks keys up"),
        ({"mask_function": lambda b, h, q, k: k <= q if TABLE.sum() > 3 else k < q}, "cannot be traced"),
        ({"mask_function": lambda b, h, q, k: (k <= q).any(), "use_vmap": True}, "single positions"),
        (
            {"mask_function": masking_utils.chunked_causal_mask_function(50, torch.tensor([0, 3]))},
            "chunks begin where only the inputs say",
        ),
    ],
)  # fmt: skip
def test_what_is_not_proven_is_not_guessed(arguments, reason):
    mask = described(**arguments)
    assert not mask.proven
    assert reason in mask.proven.reason
    assert isinstance(mask.made, torch.Tensor)


def test_a_lazy_mask_is_the_mask_to_every_operation():
    mask, causal = described(), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    assert isinstance(mask, LazyMask)
    assert (mask.size(), mask.dim(), mask.ndim) == ((2, 1, LENGTH, LENGTH), 4, 4)
    assert "made" not in vars(mask), "nobody has looked at it yet"
    assert repr(mask) == "LazyMask((2, 1, 200, 200), device='cpu')"
    assert torch.equal(mask[..., :100], causal[..., :100])
    assert torch.equal(~mask, ~causal)
    assert torch.equal(mask & causal, causal)
    assert torch.where(mask, 0.0, -1.0).sum() == -2 * LENGTH * (LENGTH - 1) / 2
    assert not isinstance(mask.to(torch.float32), LazyMask)
    assert torch.equal(mask.mT, causal.mT)
    assert torch.equal(mask.data, causal)
    by_position = described(mask_function=lambda b, h, q, k: torch.where(k <= q, k >= 0, k < 0), use_vmap=True)
    assert torch.equal(by_position.float(), causal.float())


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_written_into_is_no_longer_what_it_was(inference, prefill):
    """Its description stays that of the mask that was asked for."""
    module = tiny("llama").model.layers[0].self_attn
    configure(module, EXACT)
    tensors = [torch.randn(2, heads, LENGTH, 8, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2)]
    with torch.inference_mode(inference):
        mask = described(attention_mask=torch.arange(LENGTH).expand(2, -1) > 3)
        assert not mask[0, 0, 0, 0]
        assert mask.holds, "nobody has written yet"
        mask[:, :, 50:, 5:20] = False
        assert not mask.holds
        result, _ = s2o_attention_forward(module, *tensors, mask)
        expected, _ = sdpa_attention_forward(module, *tensors, mask.made)
    seen = mask.made.any(-1).squeeze(1)
    torch.testing.assert_close(result[seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert [path for path, _ in prefill()] == ["masked"]


def test_models_without_sdpa_get_the_masks_of_eager():
    mask = described(config=transformers.GptOssModel.config_class(), dtype=torch.bfloat16, q_offset=-5)
    assert isinstance(mask, LazyMask)
    assert (mask.dtype, mask.fully_masked) == (torch.bfloat16, "mean")
    assert torch.equal(torch.nn.functional.pad(mask, (0, 1))[..., :-1] == 0, described(q_offset=-5).made)


@pytest.mark.parametrize("is_causal", [True, False])
def test_models_without_sdpa_mean_none_if_they_pass_none(is_causal, prefill):
    attention = tiny("gpt_oss").model.layers[0].self_attn
    attention.is_causal = is_causal
    configure(attention, EXACT)
    tensors = [torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2)]
    s2o_attention_forward(attention, *tensors, None)
    assert prefill() == [("s2o", "bidirectional")]


def test_decode_gets_the_masks_of_sdpa():
    assert described(q_length=1, q_offset=LENGTH - 1) is None
    assert not isinstance(described(q_length=1, q_offset=150, allow_is_causal_skip=False), LazyMask)
