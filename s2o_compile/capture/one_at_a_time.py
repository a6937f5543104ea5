"""The lock of all that changes or traces for the whole process: looks at a model, exports, packages.

Stances, filters of warnings, patched functions of Inductor and the tracers of torch.export belong to no thread. Of two
threads the second would find what the first has set, and restore it behind the first.
"""

from __future__ import annotations

import threading

ONE_AT_A_TIME = threading.RLock()
"""One lock for all of them: nobody waits for two. A thread may enter again, as a look does with its audit."""
