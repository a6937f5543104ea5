"""One report of what several ranks recorded."""

from __future__ import annotations

import dataclasses
from typing import Any

from s2o_compile.kernels.sequence.ranks import Ranks
from s2o_compile.recording import Recording
from s2o_compile.report import Report, Site


def gather_report(recording: Recording, mesh: Any) -> Report:  # noqa: ANN401 (a DeviceMesh or a process group)
    """The report of all ranks; every rank calls it, behind its block, and gets the same.

    A site's density is that of all ranks together, and its error the mean of theirs. ``Report.rank_pairs`` holds the
    computed pairs of each rank, and ``Report.imbalance`` the largest of them over their mean. Everything else, such as
    graphs and times, is the first rank's.

    Args:
        recording: Of ``s2o_compile.record()``, on each rank.
        mesh: One dimension of a ``DeviceMesh``, or a process group.

    Raises:
        RankError: A rank has ended.
    """
    calls = [(call.site, call.pairs, call.area.sum().item(), call.error) for call in recording.calls]
    gathered = Ranks(mesh, "gather_report").objects((recording.report, calls))
    report: Report = gathered[0][0]

    def of_all(site: Site) -> Site:
        own = [call for _, of_rank in gathered for call in of_rank if call[0] == site.name]
        area, errors = sum(call[2] for call in own), [call[3] for call in own if call[3] is not None]
        changes = {
            "density": sum(call[1] for call in own) / area if area else site.density,
            "error": sum(errors) / len(errors) if errors else site.error,
        }
        return dataclasses.replace(site, **changes) if own and site.rewritten else site

    sites, called = (tuple(map(of_all, found)) for found in (report.sites, report.called))
    pairs = tuple(sum(call[1] for call in of_rank) for _, of_rank in gathered)
    return dataclasses.replace(report, sites=sites, called=called, rank_pairs=pairs)
