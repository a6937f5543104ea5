"""Whatever a method of an optimized model calls is compiled where the call comes in, and sparse."""

import functools

import pytest
import torch
from torch import nn

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.support.torch_compat import torch_release
from tests.helpers.tiny import TinyAttention, tiny_input, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
LENGTH = 150


class Generator(nn.Module):
    """A model whose ``generate`` calls itself."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model()

    def forward(self, x):
        return self.model(x)

    def generate(self, x):
        return self(x)


class Adapted(nn.Module):
    """As peft wraps a model: ``generate`` is the inner model's, found by ``__getattr__``."""

    class Base(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("model"), name)

        def forward(self, *args):
            return self.model(*args)

    def __init__(self):
        super().__init__()
        self.base_model = self.Base(Generator())

    def forward(self, x):
        return self.base_model(x)

    def generate(self, x):
        return self.base_model.generate(x)


class Vision(nn.Module):
    """As vision-language models and autoencoders: methods call towers, layers one by one, and never forward."""

    def __init__(self):
        super().__init__()
        self.tower, self.language_model = tiny_model(), tiny_model()

    def forward(self, x):
        raise NotImplementedError

    def get_image_features(self, x):
        return self.tower(x)

    def encode(self, x):
        for layer in self.tower.layers:
            x = layer(x)
        return x

    def generate(self, x):
        return self.get_image_features(x) + self.language_model(x)


def offloaded():
    """As accelerate's hooks: one function stands in the place of ten modules' forwards, and breaks the graph."""

    @torch.compiler.disable
    def load(module):
        module.loaded = True

    def new_forward(module, *args):
        load(module)
        return module._old_forward(*args)

    model = nn.Sequential(*[TinyAttention() for _ in range(3)]).eval()
    for module in model.modules():
        module._old_forward = module.forward
        module.forward = functools.update_wrapper(functools.partial(new_forward, module), module.forward)
    return model


WAYS = {
    "adapted": (Adapted, "generate", ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]),
    "features": (Vision, "get_image_features", ["tower.layers.0", "tower.layers.1"]),
    "layers": (Vision, "encode", ["tower.layers.0", "tower.layers.1"]),
    "several": (
        Vision,
        "generate",
        ["tower.layers.0", "tower.layers.1", "language_model.layers.0", "language_model.layers.1"],
    ),
    "forward": (Generator, "forward", ["model.layers.0", "model.layers.1"]),
    "offloaded": (offloaded, "__call__", ["0", "1", "2"]),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_in_is_sparse(way):
    make, method, sites = WAYS[way]
    torch.manual_seed(0)
    model, x = make(), tiny_input(LENGTH)
    expected = getattr(model, method)(x)
    fast = s2o_compile.optimize(model, EXACT)
    with s2o_compile.record() as recording:
        torch.testing.assert_close(getattr(fast, method)(x), expected)
    assert [call.path for call in recording.calls] == ["s2o"] * len(sites)
    assert [site.name for site in recording.report.sites if site.rewritten] == sites
    assert s2o_compile.status(fast).sparse == recording.status.sparse == len(sites)
    report = s2o_compile.explain(model, x, config=EXACT, method=method)
    assert [site.name for site in report.sites] == sites
    assert not report.not_found


@torch.no_grad()
def test_settings_of_a_site_hold_under_every_way_in():
    marks = {"tower.layers.1": (0, 1)}
    fast = s2o_compile.optimize(Vision(), S2OConfig(min_seq_len=0, inner_backend="eager", dense_heads=marks))
    with s2o_compile.record() as recording:
        fast.get_image_features(tiny_input(LENGTH))
    assert {call.site: call.path for call in recording.calls} == {"tower.layers.0": "s2o", "tower.layers.1": "dense"}


@torch.no_grad()
def test_it_is_compiled_once_from_outside():
    """An inner module that the outer one calls is part of its graph, to the same bits; by itself it has its own."""
    fast, x = s2o_compile.optimize(Generator(), EXACT), tiny_input(LENGTH)
    first = fast(x)
    assert s2o_compile.status(fast).graphs == 1
    assert torch.equal(fast.model(x), first)
    assert torch.equal(fast.generate(x), first)
    status = s2o_compile.status(fast)
    assert (status.calls, status.graphs) == (3, 2)


@pytest.mark.skipif(torch_release() < (2, 13), reason="torch.compile takes recompile_limit by 2.13")
@torch.no_grad()
def test_a_model_of_more_graphs_than_dynamos_default():
    """Turns, decoding, batches and caches of a language model are that many: it ran uncompiled from the ninth on."""
    fast = s2o_compile.optimize(tiny_model(), EXACT, dynamic=False)
    for length in range(LENGTH, LENGTH + 12):
        fast(tiny_input(length))
    status = s2o_compile.status(fast)
    assert (status.graphs, status.sparse, status.uncompiled_calls) == (12, 24, 0)


@torch.no_grad()
def test_a_limit_that_the_user_sets_after_the_first_call():
    """What was compiled under the other limit stays."""
    fast = s2o_compile.optimize(tiny_model(), EXACT, dynamic=False)
    for length in range(LENGTH, LENGTH + 2):
        fast(tiny_input(length))
    with torch._dynamo.config.patch(recompile_limit=3):
        fast(tiny_input(LENGTH + 2))
        with pytest.warns(match="raise torch.compiler.config.recompile_limit and optimize anew"):
            fast(tiny_input(LENGTH + 3))
        fast(tiny_input(LENGTH))
    status = s2o_compile.status(fast)
    assert (status.graphs, status.uncompiled_calls) == (3, 1)


class User(nn.Module):
    """A user's model around torch's own encoder or decoder, whose frames Dynamo does not capture."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.kind = nn.Linear(32, 32), kind
        if "decoder" in kind:
            self.core = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)
        else:
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.core = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, mask, padding=None):
        x = self.first(x)
        if "decoder" in self.kind:
            return self.core(x, x, tgt_mask=mask, tgt_key_padding_mask=padding)
        return self.core(x, mask=mask, src_key_padding_mask=padding)


@pytest.mark.parametrize("kind", ["encoder", "padded encoder", "decoder", "padded decoder"])
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@torch.no_grad()
def test_torchs_own_layers_without_a_hint(kind):
    """A causal mask without ``is_causal`` breaks the graph inside torch, a padding mask of another dtype does not."""
    torch.manual_seed(0)
    model, x = User(kind).eval(), tiny_input(LENGTH, batch=2)
    inputs = [x, nn.Transformer.generate_square_subsequent_mask(LENGTH)]
    if "padded" in kind:
        inputs.append(torch.arange(LENGTH).expand(2, -1) >= torch.tensor([[130], [150]]))
    expected = model(*inputs)
    fast = s2o_compile.optimize(model, EXACT)
    torch.testing.assert_close(fast(*inputs), expected, atol=1e-5, rtol=1e-5)
    status = s2o_compile.status(fast)
    assert status.sparse == (4 if "decoder" in kind else 2)
    assert [reason.partition(" ")[0] for reason in status.graph_breaks] == ["Unsupported"]  # Tensor.item()
    report = s2o_compile.explain(model, *inputs, config=EXACT)
    parts = ("self_attn", "multihead_attn") if "decoder" in kind else ("self_attn",)
    assert [site.name for site in report.sites] == [f"core.layers.{at}.{part}" for at in range(2) for part in parts]
    assert not report.not_found


IDS = torch.randint(1, 90, (1, LENGTH), generator=torch.Generator().manual_seed(0))
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}


class TestOtherProjects:
    """The packages themselves, where they are installed."""

    def llama(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()

    def assert_generates_sparse(self, model, sites, **inputs):
        inputs |= {"max_new_tokens": 2, "do_sample": False}
        with torch.no_grad():
            expected = model.generate(**inputs)
            fast = s2o_compile.optimize(model, EXACT)
            with s2o_compile.record() as recording:
                assert torch.equal(fast.generate(**inputs), expected)
        assert s2o_compile.status(fast).sparse == len(sites)
        assert [site.name for site in recording.report.sites if site.rewritten] == sites

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    def test_peft(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(self.llama(), config).eval()
        self.assert_generates_sparse(model, ["base_model.model.model.layers.0.self_attn"], input_ids=IDS)

    @pytest.mark.slow
    def test_accelerate(self):
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.cpu_offload(self.llama(), execution_device="cpu")
        self.assert_generates_sparse(model, ["model.layers.0.self_attn"], input_ids=IDS)

    @pytest.mark.slow
    def test_llava(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        vision = transformers.CLIPVisionConfig(**sizes, image_size=48, patch_size=4)
        config = transformers.LlavaConfig(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=96,
            image_seq_length=144,
            vision_feature_layer=-1,
        )
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        sites = ["model.vision_tower.encoder.layers.0.self_attn", "model.language_model.layers.0.self_attn"]
        ids = torch.cat((torch.full((1, 144), 96), IDS), 1)
        self.assert_generates_sparse(model, sites, input_ids=ids, pixel_values=torch.randn(1, 3, 48, 48))

    @torch.no_grad()
    def test_diffusers(self):
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, layers_per_block=1).eval()
        fast, image = s2o_compile.optimize(model, EXACT), torch.randn(1, 3, 16, 16)
        latent = fast.encode(image).latent_dist.mean
        torch.testing.assert_close(latent, model.encode(image).latent_dist.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fast.decode(latent).sample, model.decode(latent).sample, atol=1e-5, rtol=1e-5)
        assert s2o_compile.status(fast).sparse == 2


def hooked(model):
    """The same model with hooks that break the graph around each layer, as FSDP's do."""
    for layer in model.layers:
        layer.register_forward_pre_hook(torch._dynamo.disable(lambda *_: None))
    return model


def test_layers_behind_hooks_have_settings_of_their_own(recwarn):
    config = S2OConfig(tau=3.0, min_seq_len=0, segment_len=128, inner_backend="eager", dense_heads={"layers.1": (0,)})
    x = tiny_input(700)
    with torch.no_grad():
        expected = s2o_compile.optimize(tiny_model(), config)(x)
        plain = s2o_compile.optimize(tiny_model(), S2OConfig(tau=3.0, min_seq_len=0, inner_backend="eager"))(x)
        model = s2o_compile.optimize(hooked(tiny_model()), config)
        with s2o_compile.record() as recording:
            output = model(x)
    assert [site.name for site in recording.report.sites] == ["layers.0", "layers.1"]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert not torch.equal(plain, expected)
    assert not [str(warning.message) for warning in recwarn if "unknown site" in str(warning.message)]
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_a_forward_that_layers_share_behind_hooks_is_refused():
    model = hooked(tiny_model())
    for layer in model.layers:
        layer.forward = functools.partial(TinyAttention.forward, layer)
    config = S2OConfig(min_seq_len=0, inner_backend="eager", dense_heads={"layers.1": (0,)})
    with pytest.raises(Exception, match="expected a model that is captured whole"), torch.no_grad():
        s2o_compile.optimize(model, config)(tiny_input(LENGTH))


@pytest.mark.parametrize("place", ["", "layers.1", "layers.0.qkv"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_of_a_model_that_was_called_before_are_heard(place, kind):
    """Dynamo's default has no guards on hooks: it would run the graph that it has."""
    model, x = tiny_model(), tiny_input()
    fast = s2o_compile.optimize(model, EXACT)
    fast(x)
    before, heard = fast(x), []
    for either in (model, fast):
        handle = getattr(either.get_submodule(place), kind)(lambda *_: heard.append(1))
        either(x)
        handle.remove()
    assert len(heard) == 2
    fast(x)
    assert len(heard) == 2
    doubled = fast.get_submodule(place).register_forward_hook(lambda _, inputs, output: 2 * output)
    assert not torch.allclose(fast(x), before)
    doubled.remove()
    torch.testing.assert_close(fast(x), before)
