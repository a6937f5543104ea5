"""The words of one attention call, which every other room of kernels/ uses: its mask, plan, options, checks and result.

May import: ``support``.
"""
