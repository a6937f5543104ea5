"""Triton's interpreter, faster: it prepares ``triton.language`` once a launch for each module, not at every call."""

import importlib.util


def prepare_once():
    """Makes calls between jit functions cheap.

    Triton (3.6 to 3.9) looks through all of ``triton.language`` at each of them, for names that it has replaced at the
    first call out of that module. That took over a third of the time of interpreted kernels.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    launch, call = GridExecutor.__call__, InterpretedFunction.__call__
    prepared = set()

    def launch_anew(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def call_prepared(self, *args, **kwargs):
        if self.fn.__module__ in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_anew, call_prepared
