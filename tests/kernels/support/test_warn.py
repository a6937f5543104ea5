"""Warnings: one function makes them, once a job, at the line of the user's program that they are about."""

import warnings

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.support import cpp_library, errors
from tests.helpers.ranks import check_ranks

BROKEN = cpp_library._Loaded(None, "expected a C++ compiler, got none", "Install g++")


def missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_library, "_known", lambda: BROKEN)
    cpp_library._warn.cache_clear()
    x = torch.zeros(1, 1, 256, 16)
    return lambda: s2o_compile.attention(x, x, x, config=s2o_compile.S2OConfig(min_seq_len=128))


def broken_file(monkeypatch, tmp_path):
    (tmp_path / "tuned.json").write_text("{}")
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(tmp_path / "tuned.json"))
    tuned.forget()
    x = torch.zeros(1, 1, 256, 16)
    return lambda: s2o_compile.attention(x, x, x)


def wanted_gradients(monkeypatch, tmp_path):
    x = torch.zeros(1, 1, 256, 16, requires_grad=True)
    return lambda: s2o_compile.attention(x, x, x, config=s2o_compile.S2OConfig(min_seq_len=128))


def old_keyword(monkeypatch, tmp_path):
    x = torch.zeros(1, 1, 8, 16)
    return lambda: s2o_compile.attention(x, x, x, blind="zeros")


def old_field(monkeypatch, tmp_path):
    return lambda: s2o_compile.S2OConfig.from_dict({"list_per": "head"})


class Uncompiled(torch.nn.Module):
    """A layer that Dynamo passes over."""

    @torch.compiler.disable
    def forward(self, x):
        return x + 1


class Dense(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


def nothing_rewritten(monkeypatch, tmp_path):
    torch._dynamo.reset()
    compiled = torch.compile(Dense(), backend="s2o", options={"s2o.inner_backend": "eager"})
    return lambda: compiled(torch.zeros(1, 1, 256, 16))


def nothing_ran_sparse(monkeypatch, tmp_path):
    model = s2o_compile.optimize(Uncompiled().eval(), s2o_compile.S2OConfig(inner_backend="eager", min_seq_len=128))
    return lambda: model(torch.zeros(1, 256, 16))


SITUATIONS = [
    *(missing_compiler, broken_file, wanted_gradients, old_keyword, old_field, nothing_rewritten, nothing_ran_sparse),
]


@pytest.fixture(autouse=True)
def fresh():
    yield
    cpp_library._warn.cache_clear()
    tuned.forget()


def said(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [
        warning for warning in caught if "s2o" in str(warning.message).lower() or "now called" in str(warning.message)
    ]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_it_names_the_users_line(situation, monkeypatch, tmp_path):
    act = situation(monkeypatch, tmp_path)
    caught = said(act)
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, act.__code__.co_firstlineno)]


@pytest.mark.parametrize("situation", [missing_compiler, broken_file, wanted_gradients])
@pytest.mark.parametrize(("rank", "local"), [(0, "0"), (1, "1"), (8, "0"), (0, None), (1, None)])
def test_one_rank_warns_and_of_its_own_machine_one_of_each(situation, rank, local, monkeypatch, tmp_path):
    act = situation(monkeypatch, tmp_path)
    monkeypatch.setattr(errors, "this_rank", lambda: (rank, 16))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    of_machine = situation is not wanted_gradients and local is not None
    assert len(said(act)) == (local == "0" if of_machine else rank == 0)


def test_one_of_a_machine_before_its_ranks_know_each_other(monkeypatch):
    """As at the import."""
    for local, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert len(said(lambda: errors.warn("s2o", each_machine=True))) == count


def on_a_rank(rank, folder):
    with pytest.MonkeyPatch.context() as patch:
        return [len(said(situation(patch, folder / str(rank)))) for situation in (missing_compiler, wanted_gradients)]


@pytest.mark.slow
def test_two_ranks_warn_once(tmp_path):
    assert check_ranks(on_a_rank, 2, tmp_path) == [[1, 1], [0, 0]]
