"""A lazy mask means what it meant when it was asked for, whatever of it changes before anybody looks."""

import functools
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from s2o_compile import S2OConfig  # noqa: E402
from s2o_compile.transformers import configure, s2o_attention_forward, s2o_mask  # noqa: E402
from s2o_compile.transformers.lazy_mask import LazyMask  # noqa: E402
from s2o_compile.transformers.mask_functions import ProvenMask  # noqa: E402
from s2o_compile.transformers.snapshots import snapshot  # noqa: E402

QUERIES, KEYS = 40, 60
CAUSAL = masking_utils.causal_mask_function
WINDOW = [9]
TABLE = torch.tensor(9)
SETTINGS = types.SimpleNamespace(window=9)


def asked(**arguments):
    given = {"batch_size": 2, "q_length": QUERIES, "kv_length": KEYS, "mask_function": CAUSAL, "device": "cpu"}
    given |= {"config": transformers.LlamaModel.config_class(), "q_offset": 20, "allow_is_causal_skip": False}
    return s2o_mask(**given | arguments)


def advanced_offset():
    """A static cache's length, which its update advances."""
    offset = torch.tensor(20)
    return {"q_offset": offset}, lambda: offset.add_(QUERIES)


def advanced_key_offset():
    """A sliding layer's, which grows with its keys."""
    offset = torch.tensor(10)
    return {"q_offset": 30, "kv_offset": offset}, lambda: offset.add_(QUERIES)


def written_padding():
    mask = torch.arange(KEYS).expand(2, -1) > 4
    mask = mask.contiguous()
    return {"attention_mask": mask}, lambda: mask.fill_(True)


def captured_tensor():
    """The left padding of a chunked mask."""
    padding = torch.tensor([0, 0])
    return {"mask_function": masking_utils.chunked_causal_mask_function(16, padding)}, lambda: padding.fill_(5)


def captured_table():
    """A packed sequence."""
    parts = (torch.arange(KEYS) // 13).expand(2, -1).contiguous()
    packed = masking_utils.packed_sequence_mask_function(parts)
    return {"mask_function": masking_utils.and_masks(CAUSAL, packed)}, lambda: parts.fill_(0)


def captured_tensor_of_a_captured_function():
    width = torch.tensor(9)

    def near(b, h, q, k):
        return q - k < width

    return {"mask_function": masking_utils.and_masks(CAUSAL, lambda *at: near(*at))}, lambda: width.fill_(3)


def rebound_variable():
    width = 9

    def near(b, h, q, k):
        return (k <= q) & (q - k < width)

    def change():
        nonlocal width
        width = 3

    return {"mask_function": near}, change


def captured_list():
    widths = [9]
    return {"mask_function": lambda b, h, q, k: (k <= q) & (q - k < widths[0])}, lambda: widths.__setitem__(0, 3)


def captured_dict():
    widths = {"near": 9}
    function = lambda b, h, q, k: (k <= q) & (q - k < widths["near"])  # noqa: E731
    return {"mask_function": function}, lambda: widths.update(near=3)


def captured_object():
    """A module or a configuration, which cannot be copied."""
    config = transformers.LlamaConfig(sliding_window=9)
    function = lambda b, h, q, k: (k <= q) & (q - k < config.sliding_window)  # noqa: E731
    return {"mask_function": function}, lambda: setattr(config, "sliding_window", 3)


def a_method():
    class Near:
        width = 9

        def __call__(self, b, h, q, k):
            return (k <= q) & (q - k < self.width)

    near = Near()
    return {"mask_function": near}, lambda: setattr(near, "width", 3)


def a_class():
    class Near:
        width = 9

    return {"mask_function": lambda b, h, q, k: (k <= q) & (q - k < Near.width)}, lambda: setattr(Near, "width", 3)


def a_partial_function():
    width = torch.tensor(9)
    function = functools.partial(lambda b, h, q, k, width: (k <= q) & (q - k < width), width=width)
    return {"mask_function": function}, lambda: width.fill_(3)


def a_default():
    width = torch.tensor(9)

    def near(b, h, q, k, width=width):
        return (k <= q) & (q - k < width)

    return {"mask_function": near}, lambda: setattr(near, "__defaults__", (3,))


def a_keyword_default():
    def near(b, h, q, k, *, width=9):
        return (k <= q) & (q - k < width)

    return {"mask_function": near}, lambda: near.__kwdefaults__.update(width=3)


def an_attribute_of_the_function():
    def near(b, h, q, k):
        return (k <= q) & (q - k < near.width)

    near.width = 9
    return {"mask_function": near}, lambda: setattr(near, "width", 3)


def a_global_list():
    WINDOW[0] = 9
    return {"mask_function": lambda b, h, q, k: (k <= q) & (q - k < WINDOW[0])}, lambda: WINDOW.__setitem__(0, 3)


def a_global_tensor():
    TABLE.fill_(9)
    return {"mask_function": lambda b, h, q, k: (k <= q) & (q - k < TABLE)}, lambda: TABLE.fill_(3)


def a_global_object():
    SETTINGS.window = 9
    function = lambda b, h, q, k: (k <= q) & (q - k < SETTINGS.window)  # noqa: E731
    return {"mask_function": function}, lambda: setattr(SETTINGS, "window", 3)


def other_code():
    def near(b, h, q, k):
        return (k <= q) & (q - k < 9)

    def nearer(b, h, q, k):
        return (k <= q) & (q - k < 3)

    return {"mask_function": near}, lambda: setattr(near, "__code__", nearer.__code__)


CHANGES = [
    advanced_offset,
    advanced_key_offset,
    written_padding,
    captured_tensor,
    captured_table,
    captured_tensor_of_a_captured_function,
    rebound_variable,
    captured_list,
    captured_dict,
    captured_object,
    a_method,
    a_class,
    a_partial_function,
    a_default,
    a_keyword_default,
    an_attribute_of_the_function,
    a_global_list,
    a_global_tensor,
    a_global_object,
    other_code,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_that_changes_later_changes_the_mask(change):
    arguments, happens = change()
    mask, late, early = (asked(**arguments) for _ in range(3))
    meant = early.made.clone()
    happens()
    assert not torch.equal(asked(**arguments).made, meant), "the change must matter"
    assert torch.equal(late.made, meant), "made late"
    assert torch.equal(early.made, meant), "made early"
    assert torch.equal(mask.or_none, meant), "made for SDPA"
    if isinstance(mask.proven, ProvenMask):  # never made
        proven = mask.proven
        pairs = proven.mask.visible_pairs(QUERIES, KEYS, torch.device("cpu"))
        if proven.documents is not None:
            pairs = proven.documents.visible(proven.mask)
        assert torch.equal(pairs.expand(mask.shape), meant)


@pytest.mark.parametrize("shortest", [0, 1000], ids=["sparse", "dense"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_attention_after_the_change(change, shortest):
    """Layers share a mask: one attends before the change and one after."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.is_causal = True
    configure(module, S2OConfig(tau=0.0, min_seq_len=shortest))
    tensors = [torch.randn(2, heads, length, 8) for heads, length in ((4, QUERIES), (2, KEYS), (2, KEYS))]
    module.num_key_value_groups = 2
    arguments, happens = change()
    mask, shared = asked(**arguments), asked(**arguments)
    before, _ = s2o_attention_forward(module, *tensors, shared)
    expected, _ = sdpa_attention_forward(module, *tensors, asked(**arguments).made)
    happens()
    after, _ = s2o_attention_forward(module, *tensors, mask)
    again, _ = s2o_attention_forward(module, *tensors, shared)
    seen = expected.isfinite()
    for result in (before, after, again):
        torch.testing.assert_close(result[seen], expected[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [advanced_offset, written_padding, captured_tensor, captured_list, a_global_tensor])
def test_what_can_be_copied_stays_a_description(change):
    arguments, _ = change()
    mask = asked(**arguments)
    assert isinstance(mask, LazyMask)
    assert "made" not in vars(mask)
    assert mask.proven


def test_what_cannot_be_copied_is_made_at_once_and_says_so():
    mask = asked(**captured_object()[0])
    assert "made" in vars(mask)
    assert mask.proven.reason == "it is made of a LlamaConfig, which may change later"
    table = torch.eye(KEYS)
    assert "builtin" in snapshot({"read": table.index_select}).reason


def test_a_function_that_names_itself_and_one_without_its_variables():
    def falls(n):
        return 0 if n == 0 else falls(n - 1)

    def unbound():
        return never

    if falls is None:
        never = 0
    copy = snapshot({"falls": falls, "unbound": unbound, "again": falls})
    assert copy["falls"] is copy["again"] is not falls
    assert copy["falls"](3) == 0
    with pytest.raises(NameError):
        copy["unbound"]()


@pytest.mark.parametrize("shortest", [0, 1000], ids=["sparse", "dense"])
def test_a_mask_of_other_sizes_is_what_sdpa_gets(shortest):
    """None where SDPA's is_causal says the same, so a layer with more keys than its mask runs as under "sdpa"."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    configure(module, S2OConfig(tau=0.0, min_seq_len=shortest))
    tensors = [torch.randn(2, 4, length, 8) for length in (KEYS, KEYS + 3, KEYS + 3)]
    mask = asked(q_length=KEYS, q_offset=0, allow_is_causal_skip=True)
    expected, _ = sdpa_attention_forward(module, *tensors, mask.or_none)
    result, _ = s2o_attention_forward(module, *tensors, mask)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_generate_keeps_the_description():
    """It asks for contiguous masks."""
    mask = asked(q_offset=20)
    assert mask.contiguous() is mask
    assert torch.equal(mask.contiguous(memory_format=torch.contiguous_format), mask.made)
