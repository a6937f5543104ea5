"""Several GPUs: one sequence over many ranks, settings by head under tensor parallelism, reports of all ranks.

    import s2o_compile.distributed
    model = s2o_compile.distributed.context_parallel(model, mesh["cp"])      # the same calls, on every rank
    sequence = s2o_compile.distributed.shard_sequence(mesh["cp"], length)    # for calls of s2o_compile.attention

``docs/several-gpus.md`` says which way is for which model.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``kernels/sequence``, ``passes``, ``capture``.
"""

from s2o_compile.distributed.model import context_parallel
from s2o_compile.distributed.report import gather_report
from s2o_compile.distributed.sequences import shard_sequence
from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.sharded import ShardedSequence

__all__ = ["Layout", "ShardedSequence", "context_parallel", "gather_report", "shard_sequence"]
