"""What is made of an optimized module is optimized, and computes with its own weights."""

import copy
import functools
import gc
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import s2o_compile
from s2o_compile import S2OConfig
from tests.helpers.tiny import TinyAttention, tiny_input, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")


def fast(model=None, config=EXACT):
    return s2o_compile.optimize(tiny_model() if model is None else model, config)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def average(model):
    return torch.optim.swa_utils.AveragedModel(model).module


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "averaged": average,
    "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
    "optimized": lambda model: fast(copy.deepcopy(model)),
}


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("kind", COPIES)
@torch.no_grad()
def test_a_copy_has_its_own_weights_and_is_sparse(kind, called):
    model, x = fast(), tiny_input()
    expected = tiny_model()(x)
    if called:
        model(x)
    copied = COPIES[kind](model)
    assert type(copied).__qualname__ == "TinyModel"
    assert isinstance(copied, type(tiny_model()))
    torch.testing.assert_close(copied(x), expected)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x).any()
    torch.testing.assert_close(model(x), expected)
    assert s2o_compile.status(copied).sparse == 4
    assert s2o_compile.status(model).sparse == (4 if called else 2), "each has an account of its own"


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), torch.arange(1, 97).repeat(2)[None]


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), tiny_input()


@pytest.mark.parametrize("make", [llama, encoder])
@torch.no_grad()
def test_a_copy_of_a_model_with_masks_or_of_torchs_own(make):
    """Their forwards are wrapped on the way into the graph, and are those of the copy."""
    model, x = make()
    model = fast(model.eval())
    expected = model(x)[0]
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x)[0].any()
    assert torch.equal(model(x)[0], expected)
    assert s2o_compile.status(copied).sparse == 1


@torch.no_grad()
def test_a_shallow_copy_and_a_replica_compute_with_what_they_hold():
    model, x = fast(), tiny_input()
    expected = model(x)
    for copied in (copy.copy(model), model._replicate_for_data_parallel()):
        torch.testing.assert_close(copied(x), expected)
        copied._modules = dict(copied._modules)
        copied.head = nn.Identity()
        assert copied(x).shape == x.shape
    torch.testing.assert_close(model(x), expected)
    assert s2o_compile.status(model).sparse == 2 * s2o_compile.status(model).calls == 12


def sparse_in_a_process(model, x):
    with torch.no_grad():
        return model(x), s2o_compile.status(model).sparse


@pytest.mark.slow
@torch.no_grad()
def test_a_process_that_was_spawned_gets_an_optimized_model():
    model, x = fast(), tiny_input()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        output, sparse = pool.apply(sparse_in_a_process, (model, x))
    torch.testing.assert_close(output, model(x))
    assert sparse == 2


@torch.no_grad()
def test_parts_that_are_exchanged_are_those_of_the_copy():
    """Quantising, parametrizing and swapping change what is called, and no other model."""

    class Zero(nn.Module):
        def forward(self, weight):
            return weight * 0

    model, x = fast(), tiny_input()
    expected = model(x)
    parametrized = copy.deepcopy(model)
    for name in ("weight", "bias"):
        parametrize.register_parametrization(parametrized.head, name, Zero())
    assert not parametrized(x).any()
    swapped = fast()
    swapped.layers[1] = nn.Identity()
    assert not torch.allclose(swapped(x), expected)
    assert s2o_compile.status(swapped).sparse == 1
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_a_parametrized_model_itself():
    class Double(nn.Module):
        def forward(self, scale):
            return 2 * scale

    class Scaled(TinyAttention):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) * self.scale

    x, model = tiny_input(), fast(Scaled().eval())
    expected = model(x)
    parametrize.register_parametrization(model, "scale", Double())
    for each in (model, copy.deepcopy(model), fast(model)):
        torch.testing.assert_close(each(x), 2 * expected)
        assert s2o_compile.status(each).sparse
        assert type(each).__name__ == "ParametrizedScaled"


@torch.no_grad()
def test_tensors_stay_those_of_the_original():
    original, x = tiny_model(), tiny_input()
    model = fast(original)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    expected = model(x)
    assert not torch.func.functional_call(model, zeros, (x,)).any()
    torch.testing.assert_close(model(x), expected)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in original.parameters()} == {torch.bfloat16}
    assert model(x.bfloat16()).dtype is original(x.bfloat16()).dtype is torch.bfloat16
    model.load_state_dict(zeros)
    assert not original(x.bfloat16()).any()


@torch.no_grad()
def test_optimized_again_it_has_plain_names_and_the_new_configuration():
    again = fast(fast(fast()), S2OConfig(tau=0.0, min_seq_len=100_000, inner_backend="eager"))
    with s2o_compile.record() as recording:
        again(tiny_input())
    assert [site.name for site in recording.report.sites] == ["layers.0", "layers.1"]
    assert s2o_compile.status(again).paths == {"dense": 2}
    assert len(type(again).__mro__) == len(type(fast()).__mro__)


@torch.no_grad()
def test_a_module_with_its_own_way_of_copying():
    """Exported programs are graph modules, which hold methods bound to themselves."""
    x = tiny_input()
    model = fast(torch.export.export(tiny_model(), (x,)).module())
    expected = model(x)
    for copied in (copy.deepcopy(model), copy.copy(model)):
        torch.testing.assert_close(copied(x), expected)
        before = s2o_compile.status(copied).calls
        copied(x)
        assert s2o_compile.status(copied).calls == before + 1


@torch.no_grad()
def test_hooks_of_a_copy():
    """Offloading puts a partial function into the place of forward, and keeps the method that it replaced."""

    def hooked(module, *args):
        return module._old_forward(*args) * module.factor

    original, x = tiny_model(), tiny_input()
    expected = original(x)
    for module in (original, *original.layers):
        module.factor, module._old_forward = 1, module.forward
        module.forward = functools.update_wrapper(functools.partial(hooked, module), module.forward)
    model = fast(original)
    torch.testing.assert_close(model(x), expected)
    model.factor = 2
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.zero_()
    torch.testing.assert_close(model(x), 2 * expected)
    torch.testing.assert_close(original(x), expected)
    assert not copied(x).any()
    assert s2o_compile.status(copied).sparse == 2


@torch.no_grad()
def test_fully_sharded_models():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, x = distributed.init_device_mesh("cpu", (1,)), tiny_input()
        original = fsdp.fully_shard(tiny_model(), mesh=mesh)
        sharded_later = fsdp.fully_shard(fast(), mesh=mesh)
        for model in (fast(original), sharded_later):
            assert isinstance(model, fsdp.FSDPModule)
            torch.testing.assert_close(model(x), tiny_model()(x))
            assert s2o_compile.status(model).sparse == 2
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def test_a_model_that_nobody_holds_is_gone():
    model = fast()
    model(tiny_input())
    copied, weights = copy.deepcopy(model), weakref.ref(model.head.weight)
    del model
    gc.collect()
    assert weights() is None
    copied(tiny_input())


def test_compiled_in_place_it_says_where_options_belong():
    with pytest.raises(TypeError, match=r"Give mode, dynamic, fullgraph and options to s2o_compile\.optimize"):
        fast().compile(mode="max-autotune")


@torch.no_grad()
def test_more_models_than_dynamo_recompiles():
    """They share no code object: the ninth would run uncompiled."""
    x = tiny_input()
    models = [fast() for _ in range(10)]
    for model in models:
        model(x)
    assert [s2o_compile.status(model).sparse for model in models] == [2] * 10


class _Trained(nn.Module):
    """Attention with modules that compute otherwise in training."""

    def __init__(self):
        super().__init__()
        self.attention, self.dropout, self.norm = tiny_model(), nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.tied = self.norm

    def forward(self, x):
        return self.tied(self.dropout(self.attention(x)).transpose(1, 2))


@torch.no_grad()
def test_modes_are_those_of_the_model_that_is_called():
    original, x = _Trained().eval(), tiny_input()
    model, expected = fast(original), original(x)
    original.train()
    torch.testing.assert_close(model(x), expected)
    model.eval()
    assert original.dropout.training
    assert original.norm.training
    model.train()
    original.eval()
    assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(original(x), model.eval()(x))  # one running mean


def test_weights_are_those_of_both():
    original = _Trained().eval()
    model = fast(original)
    assert model.tied is model.norm
    assert all(a is b for a, b in zip(model.parameters(), original.parameters(), strict=True))
    model.double()
    assert {x.dtype for x in original.state_dict().values()} == {torch.float64, torch.int64}
    original.norm.weight = nn.Parameter(torch.zeros(8))
    assert model.norm.weight is original.norm.weight


@pytest.mark.parametrize("place", ["", "layers.1", "layers.0.qkv"])
@torch.no_grad()
def test_a_hook_is_heard_in_one_model(place):
    original, x = tiny_model(), tiny_input()
    before = original.get_submodule(place).register_forward_hook(lambda *_: heard.append("before"))
    model, heard = fast(original), []
    model.get_submodule(place).register_forward_hook(lambda *_: heard.append("copy"))
    original.get_submodule(place).register_forward_hook(lambda *_: heard.append("original"))
    original(x)
    assert heard == ["before", "original"]
    before.remove()
    heard.clear()
    model(x)
    assert heard == ["before", "copy"]


@torch.no_grad()
def test_a_container_of_a_module_is_one_for_both_until_one_gets_its_own():
    """As after ``copy.copy``: code of the user's may hold the same dict, so a copy of it could be the wrong one."""

    class Caching(TinyAttention):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            self.cache.setdefault(x.shape[1], len(self.cache))
            return super().forward(x)

    model = Caching().eval()
    model_fast = fast(model)
    model_fast(tiny_input())
    assert model_fast.cache is model.cache
    assert model.cache == {200: 0}
    model_fast.cache = {}
    model_fast(tiny_input(150))
    assert (model.cache, model_fast.cache) == ({200: 0}, {150: 0})
