"""Packed documents whose row is in shards: models of transformers and others beside one device, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from tests.distributed.test_operator import DIM, HEADS, PACKED_LENGTHS, packed_call
from tests.helpers.ranks import check_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

EXACT = S2OConfig(tau=0.0, min_seq_len=64, segment_len=128, inner_backend="eager")


def compare_varlen(rank):
    from s2o_compile.distributed import shard_sequence

    lengths = PACKED_LENGTHS[2]
    tensors, ids, _ = packed_call("causal", lengths)
    query, key, value = (x[0].transpose(0, 1) for x in tensors)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    wanted = s2o_compile.attention_varlen(query, key, value, starts, starts, window=300, config=EXACT)
    sequence, errors = shard_sequence(dist.group.WORLD, sum(lengths), documents=ids[:1].int()), []
    with sequence.attending():
        mine = [sequence.shard(x, 0) for x in (query, key, value)]
        output = s2o_compile.attention_varlen(*mine, starts, starts, window=300, config=EXACT)
        for others, options in (([0, sum(lengths)], {}), (starts, {"return_lse": True}), (starts[:-1], {})):
            with pytest.raises(s2o_compile.InputError) as error:
                s2o_compile.attention_varlen(*mine, others, others, **options)
            errors.append(str(error.value))
    return (sequence.gather(output, 0) - wanted).abs().max().item(), errors


def test_varlen_by_the_lengths_of_the_whole_sequence():
    for error, (other, lse, short) in check_ranks(compare_varlen, 2):
        assert error < 1e-5
        assert "got return_lse=False, [0, 1231] beside other documents" in other
        assert "return_lse=True" in lse
        assert "cu_seqlens_q: expected 0, then ascending numbers, and 1231 at the end" in short


def refuse(rank):
    from s2o_compile.distributed import shard_sequence

    (query, key, value), ids, _ = packed_call("causal", PACKED_LENGTHS[2])
    found = {}
    for name, documents in {
        "nobody named": None,
        "other": ids // 2,
        "of both ends": ids % 2,
        "rows": ids[:1].expand(3, -1),
    }.items():
        sequence = shard_sequence(dist.group.WORLD, ids.shape[1], documents=documents)
        mine = [sequence.shard(x, 2) for x in (query, key, value)]
        with sequence.attending(), pytest.raises((s2o_compile.InputError, s2o_compile.RankError)) as error:
            torch.ops.s2o.packed_attention(*mine, sequence.shard(ids, 1), causal=True, min_seq_len=64)
        found[name] = str(error.value)
    sequence = shard_sequence(dist.group.WORLD, ids.shape[1], documents=ids)
    mine = [sequence.shard(x, 2) for x in (query, key, value)]
    with sequence.attending(), pytest.raises(s2o_compile.InputError) as error:
        torch.ops.s2o.packed_attention(*mine, sequence.shard(ids, 1), sequence.shard(ids - 1, 1), min_seq_len=64)
    found["keys of others"] = str(error.value)
    with pytest.raises(s2o_compile.InputError) as error:
        shard_sequence(dist.group.WORLD, ids.shape[1], documents=ids[:, 1:])
    return {**found, "length": str(error.value)}


def test_refused_with_the_remedy():
    for found in check_ranks(refuse, 2):
        assert "got documents that nobody named. Name those of the whole sequence" in found["nobody named"]
        assert "got other documents" in found["other"]
        assert "got other documents" in found["of both ends"]
        assert "key_documents: expected the documents of the queries, got others" in found["keys of others"]
        assert "documents of the sequence: expected of 2 entries, as the batch, or of one, got 3" in found["rows"]
        assert "documents: expected torch.int32 or torch.int64 of shape [B, 1231]" in found["length"]


class Packed(nn.Module):
    """A model whose first attention keeps documents apart, and whose second does not."""

    def forward(self, x, ids):
        q, index = x.unflatten(2, (HEADS, DIM)).transpose(1, 2), torch.arange(x.shape[1])
        mask = (ids[:, None, :, None] == ids[:, None, None]) & (index <= index[:, None])
        q = scaled_dot_product_attention(3 * q, q, q, attn_mask=mask)
        return x + scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


def compare_models(rank, ways):
    import transformers

    import s2o_compile.transformers
    from s2o_compile.distributed import context_parallel

    found, lengths = {}, PACKED_LENGTHS[2]
    tokens = torch.randint(1, 97, (2, sum(lengths)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": DIM, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    config = transformers.MistralConfig(**sizes, **heads, sliding_window=300)
    with torch.no_grad():
        for implementation, method in ways:
            torch.manual_seed(0)
            model = transformers.MistralForCausalLM(config).eval()
            model.set_attn_implementation(implementation)
            if implementation == "s2o":
                s2o_compile.transformers.configure(model, EXACT)
            parallel = context_parallel(model, dist.group.WORLD, EXACT, method=method)
            for cached in (False, True):  # beside a cache models attend across documents
                given = {"position_ids": positions, "use_cache": cached}
                error = (parallel(tokens, **given).logits - model(tokens, **given).logits).abs().max().item()
                found[implementation, method, cached] = error
        for name, options in {"contiguous": {"order": "head_tail"}, "no cache": {"gather": False}}.items():
            places = torch.cat([torch.arange(100), torch.arange(sum(lengths) - 100)])[None]
            parallel = context_parallel(model, dist.group.WORLD, EXACT, **options)
            with pytest.raises(s2o_compile.InputError) as error:
                parallel(tokens, position_ids=places)
            found[name] = str(error.value)
        x, ids = (
            torch.randn(2, sum(lengths), 64, generator=torch.Generator().manual_seed(4)),
            packed_call("", lengths)[1],
        )
        names = {"tokens": "x", "positions": None}
        named = context_parallel(Packed(), dist.group.WORLD, EXACT, documents="ids", **names)
        found["named"] = (named(x, ids) - Packed()(x, ids)).abs().max().item()
        with pytest.raises(s2o_compile.InputError) as error:
            context_parallel(Packed(), dist.group.WORLD, EXACT, **names)(x, ids)
        found["unnamed"] = str(error.value)
    return found


WAYS = {2: [("s2o", "all_gather"), ("sdpa", "all_gather")], 4: [("s2o", "ulysses"), ("s2o", "all_gather")]}


@pytest.mark.parametrize("ranks", WAYS)
def test_models(ranks):
    pytest.importorskip("transformers")
    for found in check_ranks(compare_models, ranks, WAYS[ranks]):
        errors = {name: found.pop(name) for name in [*found] if not isinstance(found[name], str)}
        assert len(errors) == 5
        assert all(error < 1e-5 for error in errors.values()), errors
        assert "expected positions that jump on every rank" in found["contiguous"]
        assert "expected use_cache=False beside gather=False" in found["no cache"]
        assert "context parallel, ids: expected arguments with tokens" in found["unnamed"]
