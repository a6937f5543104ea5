"""Attention as public files write it: every form is what the table of docs/zoo.md says, and right in value."""

import pytest
import torch

import s2o_compile
from benchmarks import zoo_public
from benchmarks.public_form import BATCH, DIM, FORMS, HEADS, LENGTH
from s2o_compile import S2OConfig
from tests.conftest import quick_rows

QUICK = ("llama_cached", "deepseek", "mpt", "annotated", "labml", "vae", "bentrevett", "openfold", "esm_rows", "gpt1")
"""One of each kind; the rest is in the slow tier."""
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")


def inputs(dtype=torch.float32, *, fully_masked=False):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator).to(dtype) for _ in range(3))
    tokens = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 9]])
    if fully_masked:
        tokens[0] = False
    return q, k, v, tokens


def result(report):
    """The report's answer in the table's words."""
    (first, *_) = report.sites
    if first.rewritten:
        return first.mask
    return ("dense: " if first.found else "") + first.reason


def error(actual, exact):
    return (actual.double() - exact).abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick_rows(FORMS, QUICK))
@torch.no_grad()
def test_a_form_is_what_the_table_says(name, fresh_dynamo):
    form = FORMS[name]
    found = result(s2o_compile.explain(form.module(), *inputs(), config=EXACT))
    wanted, _, reason = form.result.partition(": ")
    assert found.startswith(wanted)
    assert reason in found
    for dtype in (torch.float32, torch.bfloat16):
        module = form.module().to(dtype)
        optimized = s2o_compile.optimize(module, EXACT)
        for fully_masked in (False, True):
            given = inputs(dtype, fully_masked=fully_masked)
            eager = module(*given)
            exact = form.module().double()(*(x.double() if x.is_floating_point() else x for x in given))
            # Where a whole row is -inf, eager gives NaN and the operator zeros.
            actual, eager, exact = (torch.nan_to_num(x.double()) for x in (optimized(*given), eager, exact))
            assert error(actual, exact) <= 2 * error(eager, exact) + 1e-6


def test_the_page_has_the_table():
    page = zoo_public.PAGE.read_text()
    assert zoo_public.written(page) == page, "write it by python -m benchmarks.zoo_public"
    assert len({form.files.partition(" ")[0] for form in FORMS.values()}) >= 40  # repositories alone


def test_the_rest_of_the_page_stays():
    page = "# The zoo\n\ntext\n\n" + zoo_public.section() + "\n## Not run\n\nnone\n"
    assert zoo_public.written(page) == page
    assert zoo_public.written("# The zoo\n\ntext\n") == "# The zoo\n\ntext\n\n" + zoo_public.section()
