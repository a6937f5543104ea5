"""``model.set_attn_implementation("s2o")``: S2O in transformers models that are not compiled.

    import s2o_compile.transformers                                      # makes the name "s2o" known to transformers
    model.set_attn_implementation("s2o")
    s2o_compile.transformers.configure(model, S2OConfig(tau=0.25))       # for other settings than the defaults

A mask is described instead of made (`LazyMask`), and proven if the attention is long. Traced code (``torch.compile``,
``torch.export``) gets transformers' own masks and plain torch, which the backend ``"s2o"`` rewrites with its proofs. So
do short calls, gradients, dropout and every feature that the operator does not have.

May import: ``kernels/support``, ``kernels/pages``, ``kernels/core``, ``kernels``, ``kernels/calls``, ``s2o_compile``,
``passes/graph``, ``passes/masks``.
"""

from s2o_compile.transformers.interface import NAME, configure, s2o_attention_forward, s2o_mask

__all__ = ["NAME", "configure", "s2o_attention_forward", "s2o_mask"]
