"""Time to event: what comes next and when, its likelihood against a plain one, and hazards of a known law."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import in_double, random_row
from small_models import KINDS
from torch import Tensor
from torch.nn import functional as F

from hymate.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from hymate.model.batch import FIRST_CODE_ID, UNKNOWN_ID, Batch, Coming
from hymate.model.hazards import hours_in_bins
from hymate.model.objectives import next_events
from hymate.model.pretrain_model import PretrainModel, TimeHead
from hymate.training.loop import Worker
from hymate.training.pretraining import PretrainConfig, pretraining_job

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 12
OBJECTIVE = ObjectiveConfig(
    code_weight=0.0,
    value_weight=0.0,
    time_to_event_weight=1.0,
    time_to_event_fraction=0.3,
    time_to_event_bins=3,
    time_to_event_rank=4,
)


def model_of(config: ModelConfig, objective: ObjectiveConfig = OBJECTIVE) -> tuple[PretrainModel, TimeHead]:
    """The model with weights that are all there, and its head."""
    torch.manual_seed(0)
    model = PretrainModel(config, objective, VOCAB).double().eval()
    assert model.time_head is not None
    with torch.no_grad():
        model.time_head.edges.copy_(torch.tensor([2.0, 9.0]))
        model.time_head.log_rate_V.normal_()
        model.time_head.value_V.normal_()
    return model, model.time_head


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    fraction=st.sampled_from([0.02, 0.3, 1.0]),
    hourly=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_what_comes_next_equals_a_plain_loop(lengths: list[int], fraction: float, hourly: bool, seed: int) -> None:
    row = random_row(lengths, vocab_size=6, seed=seed)
    row.code_L[::5] = UNKNOWN_ID
    if hourly:  # many events at one time
        row = replace(row, time_hours_L=(row.time_hours_L / 4).floor())
    coming = next_events(row, replace(OBJECTIVE, time_to_event_fraction=fraction))
    time, code = row.time_hours_L.tolist(), row.code_L.tolist()
    expected = []
    for a, (anchor, until) in enumerate(zip(coming.anchor_A.tolist(), coming.until_hours_A.tolist(), strict=True)):
        start, stop = row.cu_seqlens[row.segment_L[anchor] : row.segment_L[anchor] + 2]
        assert until == pytest.approx(time[stop - 1] - time[anchor])
        for wanted in range(FIRST_CODE_ID, 6):
            later = [e for e in range(start, stop) if time[e] > time[anchor] and code[e] == wanted]
            if later:
                expected.append((a, wanted, time[later[0]] - time[anchor], float(row.value_L[later[0]])))
    found = zip(*(x.tolist() for x in (coming.anchor_N, coming.code_N, coming.hours_N, coming.value_N)), strict=True)
    for mine, theirs in itertools.zip_longest(found, expected):
        assert mine == pytest.approx(theirs, abs=1e-5, nan_ok=True)
    assert coming.valued_N.tolist() == [n for n, (*_, value) in enumerate(expected) if value == value]
    assert coming.lengths == [sum(a == n for a, *_ in expected) for n in range(len(coming.anchor_A))]
    assert (coming.anchor_A.diff() > 0).all() and (
        row.segment_L[coming.anchor_A].unique() == torch.arange(len(lengths))
    ).all()
    if fraction == 1:
        assert len(coming.anchor_A) == row.num_events


def plain_sums(model: PretrainModel, row: Batch, coming: Coming) -> Tensor:
    """The terms, from the hazard of every anchor, code and bin, one after the other."""
    head = model.time_head
    assert head is not None and model.pooling is not None
    patient_AME, _ = model.pooling(model.backbone(row), coming.past(row), model.backbone.embedding)
    code_VX = head.code(model.backbone.embedding.code.weight[FIRST_CODE_ID:])
    bounds = [0.0, *head.edges.tolist(), torch.inf]
    losses, errors = [], []
    for a in range(len(coming.anchor_A)):
        member = min(int(coming.draw_A[a] * patient_AME.shape[1]), patient_AME.shape[1] - 1)
        *rate_JR, value_R = head.anchor(patient_AME[a : a + 1])[0, member].unflatten(0, (-1, head.rank))
        came = {int(coming.code_N[n]) - FIRST_CODE_ID: n for n in torch.nonzero(coming.anchor_N == a)[:, 0].tolist()}
        for v, (rate_R, code_value_R) in enumerate(code_VX.unflatten(1, (2, -1))):
            hours = float(coming.hours_N[came[v]] if v in came else coming.until_hours_A[a])
            for x_R, (start, end) in zip(rate_JR, itertools.pairwise(bounds), strict=True):
                log_hazard = x_R @ rate_R + head.log_rate_V[v]
                losses.append(log_hazard.exp() * max(0.0, min(hours, end) - start))
                if v in came and start < hours <= end:
                    losses.append(-log_hazard)
            if v in came and not coming.value_N[came[v]].isnan():
                mean = value_R @ code_value_R + head.value_V[v]
                errors.append(mean - coming.value_N[came[v]].clamp(-5, 5))
    error = torch.stack(errors)
    huber = F.huber_loss(error, torch.zeros_like(error), reduction="sum")
    return torch.stack([torch.stack(losses).sum(), huber, error.abs().sum()])


@pytest.mark.parametrize("name", ["mamba2", "variables", "three of fusion", "last"])
def test_the_loss_is_the_plain_likelihood_with_every_gradient(name: str) -> None:
    model, _ = model_of(KINDS[name])
    row = in_double(random_row((9, 1, 14, 25), vocab_size=VOCAB, seed=2))
    coming = next_events(row, OBJECTIVE)
    assert len(coming.valued_N) and model.count_targets(row).tolist() == [
        len(coming.code_N),
        len(coming.valued_N),
        len(coming.valued_N),
    ]
    found = []
    for sum_K in (model(row)["sum_K"], plain_sums(model, row, coming)):
        model.zero_grad()
        (sum_K[0] + 2 * sum_K[1]).backward()
        found.append((sum_K.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (mine, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(mine, expected.to(mine.dtype))
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", ["mamba2", "variables"])
def test_what_is_predicted_does_not_depend_on_what_comes(name: str) -> None:
    model, _ = model_of(KINDS[name])
    row = in_double(random_row((40,), vocab_size=VOCAB, seed=1))
    anchor = int(next_events(row, OBJECTIVE).anchor_A[2])

    def patient(row: Batch) -> Tensor:
        past = next_events(row, OBJECTIVE).past(row)
        return model.pooling(model.backbone(row), past, model.backbone.embedding)[0][:3]  # type: ignore[misc]

    later_L = torch.arange(40) > anchor
    assert later_L.any()
    other = replace(row, code_L=torch.where(later_L, 3, row.code_L), value_L=torch.where(later_L, 9.0, row.value_L))
    torch.testing.assert_close(patient(other), patient(row))
    assert not torch.allclose(patient(replace(row, code_L=torch.where(later_L, row.code_L, 3))), patient(row))


def test_bins_and_first_hazards_are_those_of_what_comes() -> None:
    model, head = model_of(KINDS["mamba2"])
    rows = [random_row((30, 20), vocab_size=VOCAB, seed=seed) for seed in range(5)]
    model.learn_times(rows)
    all_coming = [next_events(row, OBJECTIVE) for row in rows]
    hours = torch.cat([coming.hours_N for coming in all_coming])
    in_bins = torch.bincount(torch.bucketize(hours, head.edges.float()), minlength=3)
    assert in_bins.max() - in_bins.min() <= 1
    for v, log_rate in enumerate(head.log_rate_V.tolist()):
        events, at_risk = 0, 0.0
        for coming in all_coming:
            own_N = coming.code_N == v + FIRST_CODE_ID
            hours_A = coming.until_hours_A.index_copy(0, coming.anchor_N[own_N], coming.hours_N[own_N])
            events, at_risk = events + int(own_N.sum()), at_risk + float(hours_A.sum())
        assert log_rate == pytest.approx(math.log((events + 0.5) / at_risk), abs=1e-4)


def test_every_worker_learns_the_same_bins_however_much_it_evaluates_on(small_data: Path) -> None:
    config = PretrainConfig(
        DataConfig(str(small_data), context=64, tokens_per_row=128, min_count=1),
        KINDS["mamba2"],
        OBJECTIVE,
        TrainConfig(num_workers=2, eval_rows=1),
        RunConfig("any"),
    )
    more = replace(config, train=replace(config.train, eval_rows=4))
    jobs = [
        pretraining_job(each, Worker(rank, 2, rank, torch.device("cpu"))) for rank, each in enumerate((config, more))
    ]
    first, second = (job.module.state_dict() for job in jobs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    unlearned = PretrainModel(config.model, OBJECTIVE, VOCAB).state_dict()
    assert not torch.equal(first["time_head.edges"], unlearned["time_head.edges"])


# ------------------------------------------------------------------------------------------------- a known law

KINDS_OF_STAY, EVENT, END = (2, 3), 4, 5  # a stay begins with its kind, and ends with END
HAZARDS = {2: (0.05, 0.2), 3: (0.2, 0.02)}  # of EVENT, up to CHANGE_HOURS and after
VALUES = {2: 1.0, 3: -1.0}
CHANGE_HOURS = 10.0


def stays(number: int, seed: int) -> Batch:
    """Of both kinds; EVENT comes once, if the stay does not end before."""
    g = torch.Generator().manual_seed(seed)
    codes, times, values, lengths = [], [], [], []
    for n in range(number):
        kind = KINDS_OF_STAY[n % 2]
        early, late = HAZARDS[kind]
        risk, end, noise = (float(torch.rand((), generator=g)) for _ in range(3))
        risk, end = -float(torch.tensor(risk).clamp(min=1e-9).log()), 5 + 35 * end
        hours = risk / early if risk < early * CHANGE_HOURS else CHANGE_HOURS + (risk - early * CHANGE_HOURS) / late
        events = [(kind, 0.0, torch.nan), (EVENT, hours, VALUES[kind] + 0.2 * (noise - 0.5)), (END, end, torch.nan)]
        events = [event for event in events if event[1] <= end]
        lengths.append(len(events))
        for column, of_events in zip((codes, times, values), zip(*events, strict=True), strict=True):
            column.extend(of_events)
    row = random_row(lengths, vocab_size=6, seed=seed, statics=0)
    time_hours_L = torch.tensor(times)
    gap_hours_L = time_hours_L.diff(prepend=time_hours_L[:1]).clamp(min=0)
    value_L = torch.tensor(values)
    return replace(
        row,
        code_L=torch.tensor(codes),
        time_hours_L=time_hours_L,
        gap_hours_L=gap_hours_L,
        value_L=value_L,
        quantile_L=value_L.clamp(-1, 1),
    )


@pytest.mark.slow
def test_the_hazards_of_a_known_law_are_found() -> None:
    torch.manual_seed(0)
    config = replace(KINDS["last"], d_model=16)
    objective = replace(OBJECTIVE, time_to_event_bins=2, time_to_event_fraction=1.0)
    model = PretrainModel(config, objective, vocab_size=6)
    head = model.time_head
    assert head is not None and model.pooling is not None
    model.learn_times([stays(200, seed=0)])
    head.edges.copy_(torch.tensor([CHANGE_HOURS]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = 150
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(stays(400, seed=1 + step)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    row = stays(2000, seed=999)
    coming = next_events(row, objective)
    at_A = torch.isin(row.code_L[coming.anchor_A], torch.tensor(KINDS_OF_STAY))  # of other anchors the law is another
    with torch.no_grad():
        patient_AME, _ = model.pooling(model.backbone(row), coming.past(row), model.backbone.embedding)
        *rates_AR, value_AR = head.anchor(patient_AME)[:, 0].unflatten(1, (3, -1)).unbind(1)
        code_VX = head.code(model.backbone.embedding.code.weight[FIRST_CODE_ID:])[EVENT - FIRST_CODE_ID]
        rate_R, code_value_R = code_VX.chunk(2)
        log_rate = head.log_rate_V[EVENT - FIRST_CODE_ID]
        hazard_AJ = torch.stack([x_AR @ rate_R + log_rate for x_AR in rates_AR], dim=1).exp()
        value_A = value_AR @ code_value_R + head.value_V[EVENT - FIRST_CODE_ID]
    came = coming.code_N == EVENT
    hours_A = coming.until_hours_A.index_copy(0, coming.anchor_N[came], coming.hours_N[came])
    came_A = torch.zeros_like(hours_A).index_fill(0, coming.anchor_N[came], 1.0)
    expected_A = (hazard_AJ * hours_in_bins(hours_A, head.edges)).sum(dim=1)
    for kind, law in HAZARDS.items():
        own_A = at_A & (row.code_L[coming.anchor_A] == kind)
        torch.testing.assert_close(hazard_AJ[own_A].mean(0), torch.tensor(law), rtol=0.12, atol=0)
        assert float(value_A[own_A].mean()) == pytest.approx(VALUES[kind], abs=0.1)
        # calibrated: as many events as the hazards say, of stays that the model has not seen
        assert float(expected_A[own_A].sum()) == pytest.approx(float(came_A[own_A].sum()), rel=0.1)
