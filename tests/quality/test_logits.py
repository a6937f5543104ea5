"""Logits in pieces: the figures of whole logits, for every way from hidden states to logits, in little memory."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s2o_compile
from s2o_compile import S2OConfig, WholeLogitsWarning
from s2o_compile.kernels import planner
from s2o_compile.quality import logits
from s2o_compile.quality.batches import token_batches
from s2o_compile.quality.logits import LogitsReader
from tests.helpers.tiny import tiny_language_model, tiny_tokens

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CONFIG = S2OConfig(tau=4.0, min_seq_len=0, segment_len=128, inner_backend="eager")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}


def made(config, model):
    torch.manual_seed(0)
    return model(config).eval()


class WithBody(nn.Module):
    """A model of a user's own, with a body that returns a tensor. Its head may do anything."""

    def __init__(self):
        super().__init__()
        self.base_model = tiny_language_model()
        self.base_model.head = nn.Identity()
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        return self.head(self.base_model(ids))


class ByPosition(WithBody):
    """A head that looks at the place in the sequence, which a piece does not know."""

    def forward(self, ids):
        logits = super().forward(ids)
        return logits * torch.arange(1, logits.shape[1] + 1)[:, None]


class Twice(WithBody):
    def forward(self, ids):
        return self.head(self.base_model(ids) + self.base_model(ids))


class Direct(WithBody):
    """Needs as many states as tokens."""

    def forward(self, ids):
        return self.head(self.base_model(ids) + self.base_model.tokens(ids))


MODELS = {
    "llama": lambda: made(transformers.LlamaConfig(**SIZES), transformers.LlamaForCausalLM),
    "gemma3": lambda: made(transformers.Gemma3TextConfig(**SIZES, head_dim=8), transformers.Gemma3ForCausalLM),
    "gemma2-softcap": lambda: made(
        transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05), transformers.Gemma2ForCausalLM
    ),
    "granite-scaled": lambda: made(
        transformers.GraniteConfig(**SIZES, logits_scaling=0.3), transformers.GraniteForCausalLM
    ),
    "opt-decoder": lambda: made(transformers.OPTConfig(**SIZES, **OPT), transformers.OPTForCausalLM),
    "own": lambda: WithBody().eval(),
}


def reader_of(model, ids):
    (batch,) = token_batches("test", model, ids)
    with torch.no_grad():
        return LogitsReader("test", model, batch)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_pieces_give_the_figures_of_whole_logits(make, monkeypatch):
    model, ids = make(), tiny_tokens(270, batch=2)
    assert reader_of(model, ids).reason == ""
    monkeypatch.setattr(planner, "default_chunk_len", lambda _: 64)  # lists of two chunks: tiles stop
    monkeypatch.setattr(logits, "PIECE_BYTES", 4 * 97 * 64)
    pieces = s2o_compile.evaluate(model, ids, CONFIG, needles=False)
    monkeypatch.setattr(logits, "_bodies", lambda _: ())
    whole = s2o_compile.evaluate(model, ids, CONFIG, needles=False)
    for name in ("loss_dense", "loss_s2o", "kl"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-5, abs=1e-7)
    assert pieces.top1_agreement == whole.top1_agreement
    assert (pieces.tokens, pieces.sites, pieces.exact_sites) == (whole.tokens, whole.sites, whole.exact_sites)
    assert whole.loss_s2o != whole.loss_dense


def test_the_softcap_stands_in_the_pieces():
    """So the test above sees a softcap that is left out."""
    model, ids = MODELS["gemma2-softcap"](), tiny_tokens(300)
    with torch.no_grad():
        capped = model(ids).logits
        bare = model.lm_head(model.model(ids).last_hidden_state)
    assert (capped - bare).abs().max() > 1e-3
    with torch.no_grad(), reader_of(model, ids) as reader:
        (batch,) = token_batches("test", model, ids)
        piece = reader.read(model, batch).at(0, torch.arange(40, 90))
    assert torch.allclose(piece, capped[0, 40:90], atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator returns; compiled code counts, too."""

    elements = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.t.default:  # a view of the head's weight
            for x in tree_leaves(result):
                self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("pieces", [True, False])
def test_nothing_of_all_tokens_times_the_vocabulary_is_made(pieces, monkeypatch):
    vocabulary, ids = 8000, tiny_tokens(600, batch=2)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": vocabulary})
    model = made(config, transformers.LlamaForCausalLM)
    monkeypatch.setattr(logits, "PIECE_BYTES", 4 * 300_000)
    if not pieces:
        monkeypatch.setattr(logits, "_bodies", lambda _: ())
    with Largest() as largest:
        found = s2o_compile.evaluate(model, [ids] * 2, CONFIG, needles=False)
    assert len(found.sites) == 2
    whole = ids.numel() * vocabulary
    assert largest.elements <= 300_000 if pieces else largest.elements == whole


def test_many_batches_share_one_graph(monkeypatch):
    """The hook stands throughout: another one for each batch would be captured anew, and soon given up."""
    compiled, rewrite = [], s2o_compile.api.rewrite
    monkeypatch.setattr("s2o_compile.api.rewrite", lambda *given: compiled.append(1) or rewrite(*given))
    s2o_compile.evaluate(MODELS["llama"](), [tiny_tokens(300)] * 10, CONFIG, needles=False)
    assert compiled == [1]


def test_the_hook_is_gone_afterwards():
    model, ids = MODELS["llama"](), tiny_tokens(300)
    before = model(ids).logits
    s2o_compile.evaluate(model, ids, CONFIG, needles=False)
    assert torch.equal(model(ids).logits, before)
    assert not model.model._forward_hooks
    assert "forward" not in vars(model.model)


WHOLE = {
    "no-body": (lambda: tiny_language_model(), "has no base_model"),
    "by-position": (lambda: ByPosition().eval(), "returns other logits from the hidden states of its "),
    "two-runs": (lambda: Twice().eval(), "runs its TinyLanguageModel 2 times"),
    "needs-ids": (lambda: Direct().eval(), ""),
}


@pytest.mark.parametrize(("make", "reason"), WHOLE.values(), ids=WHOLE)
def test_other_models_are_read_whole(make, reason, monkeypatch):
    model, ids = make(), tiny_tokens(300)
    found_reason = reader_of(model, ids).reason
    assert found_reason.startswith(reason)
    found = s2o_compile.evaluate(model, ids, dataclasses.replace(CONFIG, tau=0.0), needles=False)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(ids)[0, :-1].double(), ids[0, 1:])
    assert found.loss_dense == pytest.approx(expected.item(), rel=1e-5)
    assert found.loss_s2o == pytest.approx(expected.item(), rel=1e-5)
    if found_reason:
        monkeypatch.setattr(logits, "LARGE_BYTES", 300 * 50 * 4)
        with pytest.warns(WholeLogitsWarning, match=rf"got one that {found_reason}.*\(1, 300, 50\).*shorter"):
            s2o_compile.evaluate(model, [ids, ids], CONFIG, needles=False)


def test_labels_make_no_loss():
    model, ids = MODELS["llama"](), tiny_tokens(300)
    plain, labelled = (
        s2o_compile.evaluate(model, {"input_ids": ids} | more, CONFIG, needles=False) for more in ({}, {"labels": ids})
    )
    assert plain == labelled


def test_calibration_makes_no_logits():
    """Also of a model without ``logits_to_keep``."""
    model, ids, rows = WithBody().eval(), tiny_tokens(1500), []
    model.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    s2o_compile.calibrate(model, ids, 0.5, config=CONFIG)
    assert max(rows) <= logits.TRIED_TOKENS
