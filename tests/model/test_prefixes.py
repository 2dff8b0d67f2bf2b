"""Several answers a segment: each is what it would be at the end of a segment of its own, gradients too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import answered_alone, answered_at, in_double, joined, random_row
from small_models import KINDS, PAPER, timed
from torch import Tensor

from hymate.config import ModelConfig
from hymate.model import pooling
from hymate.model.batch import Batch
from hymate.model.encoder import RiskModel
from hymate.model.moments import moments_of_answers
from hymate.model.pooling import FusionPooling

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 12
TASKS = ["mortality", "readmission", "length_of_stay"]
CAUSAL = {name: config for name, config in KINDS.items() if not config.sees_ahead}
CAUSAL["paper, with a past"] = replace(PAPER, causal=True, dropout=0.0)
CAUSAL["three of attention"] = replace(CAUSAL["paper, with a past"], members=3)


def model_of(config: ModelConfig) -> RiskModel:
    torch.manual_seed(0)
    model = timed(RiskModel(config, VOCAB, TASKS, in_days=["length_of_stay"])).double().eval()
    with torch.no_grad():  # what starts at zero would hide what it multiplies
        for parameter in model.pooling.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def several_tasks(row: Batch) -> Batch:
    return replace(row, label_AT=row.label_AT.expand(-1, len(TASKS)))


def outputs_and_gradients(model: RiskModel, row: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What it says, and the gradient of each parameter."""
    model.zero_grad()
    said = model(model.ask(row))
    model.loss(row).backward()
    return said, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: RiskModel, row: Batch) -> None:
    together, gradients = outputs_and_gradients(model, row)
    alone, of_alone = outputs_and_gradients(model, answered_alone(row))
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert gradients.keys() == of_alone.keys()
    for name, expected in of_alone.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def answered_rows(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.one_of(st.integers(1, 9), st.integers(50, 150)), min_size=1, max_size=4))
    last = [
        sorted(draw(st.lists(st.integers(0, n - 1), max_size=6))) + [n - 1] * draw(st.integers(1, 2)) for n in lengths
    ]
    row = in_double(random_row(lengths, vocab_size=VOCAB, seed=draw(st.integers(0, 5))))
    if draw(st.booleans()):  # events in groups of equal times
        row = replace(row, time_hours_L=(row.time_hours_L / 4).floor() * 4)
    return answered_at(several_tasks(row), last)


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=15)
@given(row=answered_rows())
def test_answers_of_a_segment_are_those_of_segments_of_their_own(name: str, row: Batch) -> None:
    assert_alike(model_of(CAUSAL[name]), row)


@pytest.mark.parametrize("name", ["mamba2", "mean", "variables"])
def test_answers_do_not_depend_on_who_shares_the_row(name: str) -> None:
    model = model_of(CAUSAL[name])
    rows = [
        in_double(answered_at(several_tasks(random_row((n,), vocab_size=VOCAB, seed=n)), [last], seed=n))
        for n, last in ((70, [3, 64, 64, 69]), (1, [0]), (130, [*range(0, 130, 7), 129]))
    ]
    together = joined([replace(row, last_A=None) for row in rows])
    starts = torch.tensor([0, 70, 71]).repeat_interleave(torch.tensor([len(row.last_A) for row in rows]))
    together = replace(together, last_A=torch.cat([row.last_A for row in rows]) + starts)
    alone = torch.cat([model(row)["logit_AT"] for row in rows])
    torch.testing.assert_close(model(together)["logit_AT"], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=30)
@given(
    steepness=st.sampled_from([0.0, 10.0, -10.0, 1000.0, -1000.0]),
    rate=st.sampled_from([0.0, 1e-4, 50.0]),
    seed=st.integers(0, 10),
)
def test_prefixes_are_exact_however_scores_rise_or_fall(
    dtype: torch.dtype, steepness: float, rate: float, seed: int
) -> None:
    """An early prefix's weights may be e**-100,000 of the later ones': a sum of both holds nothing of them."""
    row = answered_at(random_row((150, 40), vocab_size=VOCAB, seed=seed), [[0, 1, 70, 149], [39]])
    g = torch.Generator().manual_seed(seed)
    place_L = torch.cat([torch.arange(n) for n in (150, 40)]).to(dtype)
    h_LD, score_LQ = (torch.randn(190, n, generator=g, dtype=dtype) for n in (3, 2))
    score_LQ = (score_LQ + steepness * place_L[:, None]).requires_grad_()
    h_LD.requires_grad_()
    rate_Q = torch.full((2,), rate, dtype=dtype, requires_grad=True)
    row = replace(row, time_hours_L=row.time_hours_L.to(dtype))
    found = moments_of_answers(h_LD, score_LQ, rate_Q, row)
    exact = [x.detach().double().requires_grad_() for x in (h_LD, score_LQ, rate_Q)]
    level, covariance = [], []
    for last in row.last_A.tolist():
        own = slice(0 if last < 150 else 150, last + 1)
        hours_L = (row.time_hours_L[own] - row.time_hours_L[last]).double()
        weight_LQ = (exact[1][own] + exact[2] * hours_L[:, None]).softmax(0)
        offset_LQ = hours_L[:, None] - (weight_LQ * hours_L[:, None]).sum(0)
        level.append(weight_LQ.T @ exact[0][own])
        covariance.append((weight_LQ * offset_LQ).T @ exact[0][own])
    g_AQD = torch.randn(len(level), 2, 3, generator=g, dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    for mine, wanted in ((found.level_NQD, level), (found.covariance_NQD, covariance)):
        wanted_AQD = torch.stack(wanted)
        torch.testing.assert_close(mine.double(), wanted_AQD, rtol=tolerance, atol=tolerance)
        expected = torch.autograd.grad((wanted_AQD * g_AQD).sum(), exact, retain_graph=True)
        gradients = torch.autograd.grad((mine * g_AQD).sum(), (h_LD, score_LQ, rate_Q), retain_graph=True)
        for gradient, of_reference in zip(gradients, expected, strict=True):
            assert torch.isfinite(gradient).all()
            if dtype == torch.float64:  # in float32, what hours squared are multiplied by is rounded
                scale = max(1.0, float(of_reference.abs().max()))
                torch.testing.assert_close(gradient / scale, of_reference / scale, rtol=tolerance, atol=tolerance)


def test_one_answer_at_each_end_is_the_same_either_way() -> None:
    torch.manual_seed(0)
    fusion = FusionPooling(d_model=8, num_queries=3).double()
    row = in_double(random_row((7, 90, 1), vocab_size=VOCAB))
    h_LD = torch.randn(98, 8, dtype=torch.float64)
    either = fusion(h_LD, replace(row, last_A=row.bounds[1:] - 1))[0]
    torch.testing.assert_close(either, fusion(h_LD, row)[0])


@pytest.mark.parametrize("at_once", [1, 500])
def test_variables_of_many_answers_are_the_same_block_by_block(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CAUSAL["three of variables"])
    model.train()  # without dropout, and with all states: blocks draw their own
    monkeypatch.setattr(pooling, "STATES_DROPPED", 0.0)
    row = answered_at(
        several_tasks(in_double(random_row((70, 1, 20), vocab_size=VOCAB))), [[3, 9, 9, 69], [0], [4, 19]]
    )
    whole, of_whole = outputs_and_gradients(model, row)
    monkeypatch.setattr(pooling, "AT_ONCE", at_once * 3 * 32)
    blocks, of_blocks = outputs_and_gradients(model, row)
    torch.testing.assert_close(blocks["logit_AT"], whole["logit_AT"])
    torch.testing.assert_close(of_blocks, of_whole)
