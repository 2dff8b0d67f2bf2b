"""Tasks in time: hazards and incidence against plain sums, several heads in one model, a known law that is found."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rows import random_row
from small_models import KINDS
from torch import Tensor
from torch.nn import functional as F

from hymate.config import InTime, ModelConfig
from hymate.model.batch import Batch
from hymate.model.encoder import IncidenceHead, RiskModel
from hymate.model.hazards import cumulative_incidence, first_hazards, log_likelihood

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, TASKS = 30, ["readmission", "death", "stay"]
ASKED = InTime([7.0, 30.0], "discharge")


def hazard_at(hazard_CJ: np.ndarray, edges: list[float], day: float) -> np.ndarray:
    return hazard_CJ[:, sum(day > edge for edge in edges)]


@pytest.mark.parametrize("causes", [1, 2, 3])
def test_likelihood_and_incidence_equal_plain_sums_over_small_steps(causes: int) -> None:
    rng, edges = np.random.default_rng(causes), [1.0, 4.0, 4.0, 9.0]
    log_hazard_NCJ = rng.normal(-2.5, 1, (6, causes, 5))
    time_N, cause_N, step = [0.5, 1.0, 3.0, 4.0, 8.5, 20.0], [0, 1, causes, 0, 1, causes], 1e-2
    arguments = torch.tensor(log_hazard_NCJ), torch.tensor(time_N, dtype=torch.float64)
    edges_J = torch.tensor(edges, dtype=torch.float64)
    found_N = log_likelihood(*arguments, torch.tensor(cause_N), edges_J)
    incidence_NCH = cumulative_incidence(*arguments, edges_J)
    for n, (log_hazard_CJ, time, cause) in enumerate(zip(log_hazard_NCJ, time_N, cause_N, strict=True)):
        middle_U = np.arange(step / 2, 20, step)
        hazard_CU = np.array([hazard_at(np.exp(log_hazard_CJ), edges, day) for day in middle_U]).T
        cumulative_U = np.cumsum(hazard_CU.sum(axis=0)) * step
        expected = -cumulative_U[round(time / step) - 1]
        if cause:
            expected += math.log(hazard_at(np.exp(log_hazard_CJ), edges, time)[cause - 1])
        assert float(found_N[n]) == pytest.approx(expected, abs=1e-8)
        free_U = np.exp(-(cumulative_U - hazard_CU.sum(axis=0) * step / 2))
        for h, horizon in enumerate(time_N):
            expected_C = (hazard_CU * free_U)[:, : round(horizon / step)].sum(axis=1) * step
            np.testing.assert_allclose(incidence_NCH[n, :, h], expected_C, atol=1e-4)


def test_incidence_and_the_chance_of_nothing_sum_to_one_also_for_extreme_hazards() -> None:
    log_hazard_NCJ = torch.tensor([[[-200.0, -200.0], [-300.0, -200.0]], [[20.0, -5.0], [19.0, 3.0]]]).requires_grad_()
    edges, horizons = torch.tensor([5.0]), torch.tensor([1.0, 30.0])
    incidence_NCH = cumulative_incidence(log_hazard_NCJ, horizons, edges)
    assert incidence_NCH[0].detach().tolist() == [[0, 0], [0, 0]]
    torch.testing.assert_close(incidence_NCH[1].sum(dim=0), torch.ones(2))
    incidence_NCH.sum().backward()
    assert log_hazard_NCJ.grad is not None and log_hazard_NCJ.grad.isfinite().all()


def test_first_hazards_are_events_over_the_time_at_risk() -> None:
    time_N, cause_N = torch.tensor([1.0, 2.0, 6.0, 8.0]), torch.tensor([1, 2, 1, 0])
    found_CJ = first_hazards(time_N, cause_N, torch.tensor([4.0, 4.0]), 2)  # 11 days in the first bin, 6 in the last
    mean_C = torch.tensor([2.5, 1.5]).double() / 17
    for cause, counts in enumerate([(1, 0, 1), (1, 0, 0)]):
        for at, (count, passed) in enumerate(zip(counts, (11, 0, 6), strict=True)):
            assert float(found_CJ[cause, at]) == pytest.approx((count + 0.5) / (passed + 0.5 / float(mean_C[cause])))


def in_time(row: Batch, seed: int = 0) -> Batch:
    """With labels of two binary tasks and, in the middle, one in time."""
    g, size = torch.Generator().manual_seed(seed), len(row.age_years_A)
    label_AT = (torch.rand((size, 3), generator=g) < 0.5).float()
    label_AT[:, 1] = torch.randint(0, 3, (size,), generator=g).float()
    label_AT[torch.rand((size, 3), generator=g) < 0.3] = torch.nan
    days_AT = torch.full((size, 3), torch.nan)
    days_AT[:, 1] = torch.where(label_AT[:, 1].isnan(), torch.nan, 30 * torch.rand(size, generator=g))
    weight_AT = 0.2 + torch.rand((size, 3), generator=g)
    return replace(row, label_AT=label_AT, days_AT=days_AT, label_weight_AT=weight_AT)


def several_heads(config: ModelConfig) -> RiskModel:
    torch.manual_seed(0)
    return RiskModel(config, VOCAB, TASKS, in_time={"death": ASKED}).eval()


@pytest.mark.parametrize("members", [1, 3])
def test_the_loss_and_what_is_said_are_those_of_each_head(members: int) -> None:
    model = several_heads(replace(KINDS["mamba2"], members=members))
    row = in_time(random_row((7, 1, 23, 40, 9, 12, 5, 8, 9), vocab_size=VOCAB))
    head, patient_AME = model.heads["death"], model.patient(row)[0]
    assert isinstance(head, IncidenceHead)
    log_hazard_AMCJ = head.log_hazards(patient_AME)
    said = model(row)
    losses: dict[str, Tensor] = {}
    for number, name in enumerate(TASKS):
        at = ~row.label_AT[:, number].isnan()
        label_n, weight_n = row.label_AT[at, number], row.label_weight_AT[at, number]
        if name == "death":
            each = [
                -log_likelihood(log_hazard_AMCJ[at, m], row.days_AT[at, 1], label_n, head.edges) for m in range(members)
            ]
        else:
            logit_nM = model.heads[name](patient_AME)[at, :, 0]
            each = [
                F.binary_cross_entropy_with_logits(logit_nM[:, m], label_n, reduction="none") for m in range(members)
            ]
        losses[name] = (torch.stack(each).mean(dim=0) * weight_n).sum() / weight_n.sum()
    torch.testing.assert_close(model.loss(row), torch.stack(list(losses.values())).mean())
    assert list(model.terms) == ["readmission/loss", "stay/loss", "death/loss"]
    incidence_ACH = torch.stack(
        [cumulative_incidence(log_hazard_AMCJ[:, m], head.horizons_H, head.edges) for m in range(members)]
    ).mean(dim=0)
    torch.testing.assert_close(said["incidence_AX"], incidence_ACH.flatten(1))
    torch.testing.assert_close(said["logit_AT"][:, 1].sigmoid(), incidence_ACH[:, 0, -1])
    assert said["log_days_AT"].isnan().all()


def test_a_binary_task_learns_the_same_beside_a_task_in_time() -> None:
    beside = several_heads(KINDS["mamba2"])
    row = in_time(random_row((7, 1, 23, 40, 9), vocab_size=VOCAB))
    alone = RiskModel(KINDS["mamba2"], VOCAB, ["readmission"]).eval()
    alone.load_state_dict({name: beside.state_dict()[name] for name in alone.state_dict()})
    own = replace(
        row, label_AT=row.label_AT[:, :1], days_AT=row.days_AT[:, :1], label_weight_AT=row.label_weight_AT[:, :1]
    )
    torch.testing.assert_close(beside(row)["logit_AT"][:, :1], alone(own)["logit_AT"], rtol=0, atol=0)
    weight = beside.heads["readmission"].out.weight, alone.heads["readmission"].out.weight
    (found,), (expected,) = (
        torch.autograd.grad(model(batch)["sum_K"][0], w)
        for model, batch, w in ((beside, row, weight[0]), (alone, own, weight[1]))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert alone(own)["incidence_AX"].shape == (5, 0)


def test_a_head_starts_from_the_hazards_of_all() -> None:
    torch.manual_seed(0)
    head, x_AME = IncidenceHead(KINDS["mamba2"], 5, ASKED), torch.randn(4, 1, 5)
    days_N, cause_N = torch.rand(200) * 30, torch.randint(0, 3, (200,))
    head.start_from(days_N, cause_N)
    state = head.state_dict() | {"out.weight": torch.zeros_like(head.out.weight)}
    head.load_state_dict(state)
    expected_CJ = first_hazards(days_N, cause_N, head.edges, 2).float().log()
    torch.testing.assert_close(head.log_hazards(x_AME), expected_CJ.expand(4, 1, -1, -1), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # bf16 would leave few different risks
        assert head.log_hazards(x_AME).dtype == torch.float32


def test_incidence_of_a_known_law_is_found_although_many_are_lost() -> None:
    """Two kinds of patients; the event's hazard changes on day 10; three in ten are lost before either event."""
    rng, size = np.random.default_rng(0), 3000
    kind_N = rng.integers(0, 2, size)
    early_K, late_K, rival = np.array([0.02, 0.08]), np.array([0.05, 0.01]), 0.02
    spent_N = rng.exponential(size=size)  # of the event's cumulative hazard
    first_N = early_K[kind_N] * 10
    event_N = np.where(spent_N < first_N, spent_N / early_K[kind_N], 10 + (spent_N - first_N) / late_K[kind_N])
    until = np.stack([np.minimum(rng.exponential(35, size), 60), event_N, rng.exponential(1 / rival, size)])
    days_N, cause_N = torch.tensor(until.min(axis=0)).float(), torch.tensor(until.argmin(axis=0))
    assert 0.25 < (cause_N == 0).float().mean() < 0.5

    torch.manual_seed(0)
    head = IncidenceHead(ModelConfig(d_model=8, headdim=8, dropout=0.0), 2, InTime([5.0, 10.0, 30.0], "rival"))
    head.start_from(days_N, cause_N)
    assert (head.edges.diff() > 0).all()
    patient_N1E = F.one_hot(torch.tensor(kind_N), 2).float()[:, None]
    optimiser = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(120):
        optimiser.zero_grad()
        loss = -head.log_likelihood(head.log_hazards(patient_N1E), days_N, cause_N).mean()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found_KCH = head.incidence(head.log_hazards(torch.eye(2)[:, None]))
    for kind in (0, 1):
        hazard_CJ = torch.tensor([[[early_K[kind], late_K[kind]], [rival, rival]]])
        horizons, edges = torch.tensor([5.0, 10.0, 30.0]).double(), torch.tensor([10.0]).double()
        expected_CH = cumulative_incidence(hazard_CJ.log(), horizons, edges)[0]
        np.testing.assert_allclose(found_KCH[kind], expected_CH, atol=0.03)
