"""Ranks that differ, fail or end: a clear error on every rank that is left, and no hang."""

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

import s2o_compile
from s2o_compile import S2OConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

LENGTH, SECONDS, SHORT = 600, 20, 3
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")


def tensors(heads=2):
    return [torch.randn(1, heads, LENGTH, 16) for _ in range(3)]


def attend(rank, heads=2, config=EXACT, method="all_gather", **keywords):
    from s2o_compile.distributed import shard_sequence

    sequence = shard_sequence(dist.group.WORLD, LENGTH, method=method)
    shards = [sequence.shard(x, 2) for x in tensors(heads)]
    with sequence.attending():
        return s2o_compile.attention(*shards, causal=True, config=config, **keywords)


def other_lengths(rank):
    from s2o_compile.distributed import shard_sequence

    shard_sequence(dist.group.WORLD, LENGTH + rank)


def other_padding(rank):
    from s2o_compile.distributed import shard_sequence

    key_mask = torch.ones(1, LENGTH, dtype=torch.bool)
    key_mask[0, rank] = False
    shard_sequence(dist.group.WORLD, LENGTH, key_mask=key_mask)


def other_configs(rank):
    s2o_compile.distributed.context_parallel(
        tiny_model(), dist.group.WORLD, S2OConfig(tau=0.1 * (rank + 1)), positions=None
    )


def other_inputs(rank):
    config = S2OConfig(min_seq_len=0, inner_backend="eager")
    model = s2o_compile.distributed.context_parallel(tiny_model(), dist.group.WORLD, config, positions=None, tokens="x")
    with torch.no_grad():
        model(torch.full((1, LENGTH, 32), float(rank)))


def failed_before(rank):
    if rank:
        attend(rank)
    else:  # heads that do not divide
        from s2o_compile.distributed import shard_sequence

        sequence = shard_sequence(dist.group.WORLD, LENGTH)
        query, key, value = (sequence.shard(x, 2) for x in tensors())
        with sequence.attending():
            s2o_compile.attention(query, key[:, :, 1:], value[:, :, 1:], causal=True)


def ended(rank):
    from s2o_compile.distributed import shard_sequence

    sequence = shard_sequence(dist.group.WORLD, LENGTH)
    shards = [sequence.shard(x, 2) for x in tensors()]
    if rank == dist.get_world_size() - 1:
        os._exit(1)
    with sequence.attending():
        s2o_compile.attention(*shards, causal=True)


def ended_mid_gather(rank):
    """The last rank begins to gather keys and values, and is killed before the others have its own."""
    from s2o_compile.distributed import shard_sequence
    from s2o_compile.kernels.sequence.ranks import Ranks

    sequence = shard_sequence(dist.group.WORLD, LENGTH)
    shards = [sequence.shard(x, 2) for x in tensors()]
    if rank == dist.get_world_size() - 1:
        gather = Ranks.gather

        def killed(self, sends):
            if sends.numel() > LENGTH:  # not the few numbers of an agreement
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(self, sends)

        Ranks.gather = killed
    with sequence.attending():
        s2o_compile.attention(*shards, causal=True, config=EXACT)


def ended_in_a_model(rank):
    """The last rank is killed in the second attention of a model's call."""
    from s2o_compile.kernels.calls import context_parallel as calls
    from tests.distributed.test_models import OwnPositions

    ways, seen, attend = {"tokens": "x", "positions": "places"}, [], calls._by_gathering
    parallel = s2o_compile.distributed.context_parallel(OwnPositions().eval(), dist.group.WORLD, EXACT, **ways)

    def killed(*given):
        seen.append(given)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return attend(*given)

    if rank == dist.get_world_size() - 1:
        calls._by_gathering = killed
    with torch.no_grad():
        parallel(torch.ones(1, LENGTH, 32))


def hangs(rank):
    """The last rank never comes; the others wait for the time-out of the group."""
    from s2o_compile.distributed import shard_sequence

    sequence = shard_sequence(dist.group.WORLD, LENGTH)
    shards = [sequence.shard(x, 2) for x in tensors()]
    if rank == dist.get_world_size() - 1:
        time.sleep(2 * SHORT)
        os._exit(0)
    with sequence.attending():
        s2o_compile.attention(*shards, causal=True)


def heads_do_not_divide(rank):
    attend(rank, heads=3, method="ulysses")


def ring(rank):
    attend(rank, method="ring")


def flex(rank):
    attend(rank, config=S2OConfig(min_seq_len=0, implementation="flex"))


def gradients(rank):
    from s2o_compile.distributed import shard_sequence

    sequence = shard_sequence(dist.group.WORLD, LENGTH)
    shards = [sequence.shard(x, 2).requires_grad_() for x in tensors()]
    with sequence.attending():
        s2o_compile.attention(*shards, causal=True)


def read_masks(rank):
    from s2o_compile.distributed import shard_sequence

    sequence = shard_sequence(dist.group.WORLD, LENGTH)
    with sequence.attending():
        s2o_compile.attention(*(sequence.shard(x, 2) for x in tensors()), attn_mask=torch.ones(1, 1, dtype=torch.bool))


def pages(rank):
    from s2o_compile.distributed import shard_sequence

    query, *caches = (torch.randn(40, 16, 2, 16) for _ in range(3))
    with shard_sequence(dist.group.WORLD, LENGTH).attending():
        s2o_compile.attention_paged(query[0], tuple(caches), torch.zeros(1, 4, dtype=torch.int32), [0, 16], [16])


CASES = {
    pages: ("expected a proven mask, no gradients and no plan", "or over pages.*on one rank"),
    other_lengths: ("expected the same on every rank", "rank 0: length 600.*rank 1: length 601"),
    other_padding: ("expected the same on every rank", "padding"),
    other_configs: ("expected the same on every rank", "0.1.*0.2"),
    other_inputs: ("expected the same on every rank", "checksum"),
    failed_before: ("", "expected queries and keys of this rank's|expected every rank to come this far"),
    heads_do_not_divide: ("expected key/value heads that 2 ranks can share out evenly, got 3", "all_gather"),
    ring: ("a ring cannot have either", "all_gather"),
    flex: ('implementation="flex": expected whole sequences', "auto"),
    gradients: ("expected a proven mask, no gradients and no plan", "on one rank"),
    read_masks: ("expected a proven mask, no gradients and no plan", "on one rank"),
}


def every_case(rank, names):
    """The texts of all errors: one start of the ranks makes them all."""
    found = {}
    for name in names:
        try:
            globals()[name](rank)
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.slow
def test_every_rank_says_what_is_wrong():
    answers = run_ranks(every_case, 2, [case.__name__ for case in CASES], seconds=SECONDS)
    for case, (first, second) in CASES.items():
        for rank, answer in enumerate(answers):
            assert first in answer[case.__name__], answer
            assert re.search(second, answer[case.__name__]), answer[case.__name__]
            assert f"[rank {rank} of 2]" in answer[case.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [ended, ended_mid_gather, ended_in_a_model, hangs])
def test_a_rank_that_has_ended(case, ranks):
    start = time.monotonic()
    *errors, gone = run_ranks(case, ranks, seconds=SHORT if case is hangs else SECONDS)
    assert gone is None
    for rank, error in enumerate(errors):
        assert f"RankError: [rank {rank} of {ranks}]" in str(error)
        assert f"expected all {ranks} ranks to take part" in str(error)
        assert "look at the first error in the logs of the other ranks" in str(error)
    assert time.monotonic() - start < 3 * SECONDS


def test_cpu_tensors_of_an_nccl_group():
    from s2o_compile.kernels.sequence.ranks import Ranks

    ranks = object.__new__(Ranks)
    ranks._needs_cuda = True
    with pytest.raises(s2o_compile.InputError, match="expected CUDA tensors, which NCCL exchanges, got cpu"):
        ranks.check_device(torch.zeros(1), "query")


def test_no_process_group():
    from s2o_compile.distributed import shard_sequence

    with pytest.raises(s2o_compile.InputError, match=r"expected an initialised process group.*torchrun"):
        shard_sequence(None, LENGTH)
