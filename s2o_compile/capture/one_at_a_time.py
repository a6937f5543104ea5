"""The lock of everything that changes or traces for the whole process: audits, evaluations, exports, packages.

Stances, filters of warnings, patched functions of Inductor and the tracers of torch.export belong to the process. A
second thread would save the changes of the first as the original state, and restore them afterwards.
"""

from __future__ import annotations

import threading

ONE_AT_A_TIME = threading.RLock()
"""One lock for all, so that no deadlock is possible. A thread may enter again, as `explain` does with its audit."""
