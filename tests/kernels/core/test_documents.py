"""Ids of documents: which tell the same ones apart."""

import pytest
import torch

from s2o_compile.kernels.core.documents import same_documents

DOCUMENTS = [0, 0, 1, 1, 2, 0]
CASES = {
    "the same": (DOCUMENTS, True, True),
    "other numbers": ([5, 5, -1, -1, 9, 5], True, True),
    "apart": ([0, 0, 1, 1, 2, 3], False, True),
    "joined": ([0, 0, 1, 1, 1, 0], False, False),
    "elsewhere": ([0, 1, 1, 2, 2, 0], False, False),
}


@pytest.mark.parametrize(("ids", "same", "split"), CASES.values(), ids=CASES)
def test_ids_that_tell_the_same_documents_apart(ids, same, split):
    ids, documents = torch.tensor([ids]), torch.tensor([DOCUMENTS])
    assert same_documents(ids, documents) is same
    assert same_documents(ids, documents, may_split=True) is split
    both = torch.cat([documents, ids])
    assert same_documents(both, documents) is same
    assert same_documents(documents, both) is same
