"""Masked events and forecasting targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import in_double, random_row, repacked
from small_models import SMALL

from hymate.config import ObjectiveConfig
from hymate.model.batch import FIRST_CODE_ID, MASK_ID, Batch
from hymate.model.objectives import forecast_targets, hide_events, histories_until
from hymate.model.pretrain_model import PretrainModel


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0.05, 0.9),
    span=st.floats(0, 1),
    seed=st.integers(0, 2**62),
)
@settings(max_examples=40)
def test_hidden_events_are_reproducible_and_leave_the_rest_alone(lengths, fraction, span, seed) -> None:
    row = random_row(lengths)
    row = replace(row, seed_S=(row.seed_S + seed) % 2**62)
    objective = ObjectiveConfig(mask_fraction=fraction, span_fraction=span)
    hidden, again = hide_events(row, objective), hide_events(row, objective)
    assert torch.equal(hidden.code_L, again.code_L) and torch.equal(hidden.value_L, again.value_L)
    assert (hidden.batch.code_L[hidden.code_L] == MASK_ID).all()
    assert torch.equal(hidden.batch.code_L[~hidden.code_L], row.code_L[~hidden.code_L])
    assert not torch.isnan(row.value_L[hidden.value_L]).any()


@given(num_rows=st.integers(1, 6), seed=st.integers(0, 99), horizon=st.sampled_from([1.0, 5.0, 24.0]))
@settings(max_examples=20)
def test_targets_and_their_losses_are_the_same_in_any_packing(num_rows: int, seed: int, horizon: float) -> None:
    """On an hourly grid, where events lie exactly at the end of a horizon; of time to event, also for members."""
    row = random_row((9, 1, 30, 14, 3, 21), vocab_size=12, seed=seed)
    row = in_double(replace(row, time_hours_L=row.time_hours_L.round(), gap_hours_L=row.gap_hours_L.round()))
    ahead = {"forecast_weight": 1.0, "forecast_variables": 8, "horizon_hours": horizon}
    objective = ObjectiveConfig(**ahead, time_to_event_weight=1.0, time_to_event_fraction=0.2)
    torch.manual_seed(0)
    config = replace(SMALL, dropout=0.0, members=2)
    model = PretrainModel(config, objective, vocab_size=12).double().eval()
    rows = repacked(row, num_rows, seed)
    assert torch.equal(sum(model.count_targets(each) for each in rows), model.count_targets(row))
    with torch.no_grad():
        parts_K = torch.stack([model(each)["sum_K"] for each in rows]).sum(0)
        torch.testing.assert_close(parts_K, model(row)["sum_K"], rtol=1e-5, atol=1e-5)


def test_masks_and_dropout_share_no_random_numbers() -> None:
    """Dropout draws from a generator that starts at the row's seed."""
    row = random_row([4000], seed=7)
    row = replace(row, seed_S=torch.tensor([row.seed]))
    hidden = hide_events(row, ObjectiveConfig(span_fraction=0.0))
    torch.manual_seed(row.seed)
    dropped = torch.rand(row.num_events) < 0.2
    both = float((dropped & (hidden.code_L | hidden.value_L)).float().mean())
    assert abs(both - 0.04) < 0.015


def test_share_of_hidden_events_is_as_configured() -> None:
    row = random_row([4000, 4000])
    for span_fraction in (0.0, 0.5):
        hidden = hide_events(row, ObjectiveConfig(mask_fraction=0.2, span_fraction=span_fraction))
        fraction = float((hidden.code_L | hidden.value_L).float().mean())
        assert 0.17 < fraction < 0.23


def test_forecast_targets_equal_a_plain_loop() -> None:
    row = random_row([30, 1, 50], vocab_size=12, seed=3)
    objective = ObjectiveConfig(forecast_weight=1.0, horizon_hours=6.0, forecast_points=5, forecast_variables=4)
    ahead = forecast_targets(row, objective)
    assert ahead.anchor_A.shape == (15,)
    some = False
    for a, whole, measured_K, value_K in zip(
        ahead.anchor_A.tolist(), ahead.whole_A, ahead.measured_AK, ahead.value_AK, strict=True
    ):
        own = torch.nonzero(row.segment_L == row.segment_L[a])[:, 0].tolist()
        now, end = float(row.time_hours_L[a]), float(row.time_hours_L[own[-1]])
        assert bool(whole) == (now + 6.0 <= end) == (float(row.time_hours_L[own[0]]) + 6.0 <= end)
        for k in range(4):
            events = [
                float(row.value_L[j])
                for j in own
                if now < float(row.time_hours_L[j]) <= now + 6.0 and int(row.code_L[j]) == FIRST_CODE_ID + k
            ]
            values = [value for value in events if value == value]
            some |= bool(values)
            assert bool(measured_K[k]) == bool(events)
            expected = sum(values) / len(values) if values else torch.nan
            torch.testing.assert_close(float(value_K[k]), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert some


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), points=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_histories_until_an_anchor_hold_what_is_seen_up_to_it(lengths, points, seed) -> None:
    row = random_row(lengths, vocab_size=12, seed=seed)
    ahead = forecast_targets(row, ObjectiveConfig(forecast_weight=1.0, forecast_points=points))
    seen_L = torch.rand(row.num_events, generator=torch.Generator().manual_seed(seed)) < 0.5
    past, at_L = histories_until(row, ahead.anchor_A, seen_L)
    assert past.num_segments == len(lengths) * points
    for number, anchor in enumerate(ahead.anchor_A.tolist()):
        of = number // points
        expected = [j for j in range(row.cu_seqlens[of], anchor + 1) if seen_L[j] or j == anchor]
        own = slice(past.cu_seqlens[number], past.cu_seqlens[number + 1])
        assert at_L[own].tolist() == expected and (past.segment_L[own] == number).all()
        torch.testing.assert_close(past.value_L[own], row.value_L[expected], equal_nan=True)
        static, own_static = row.static_segment_F == of, past.static_segment_F == number
        assert torch.equal(past.static_code_F[own_static], row.static_code_F[static])
        ahead_hours = row.time_hours_L[row.cu_seqlens[of + 1] - 1] + row.lag_hours_A[of] - row.time_hours_L[anchor]
        expected_age = row.age_years_A[of] - ahead_hours / 8766
        torch.testing.assert_close(past.age_years_A[number], expected_age, equal_nan=True)


def test_a_forecast_does_not_depend_on_what_comes_later() -> None:
    """The patient vectors that forecasts come from, when all later events are others, 20 years later or not there."""
    row = random_row([40], vocab_size=12, seed=1)
    row = replace(row, age_years_A=torch.tensor([60.0]))
    torch.manual_seed(0)
    config = replace(SMALL, dropout=0.0, pooling="variables")
    model = PretrainModel(config, ObjectiveConfig(forecast_weight=1.0), vocab_size=12).eval()
    assert model.pooling is not None
    torch.nn.init.normal_(model.pooling.variables.states.weight)  # type: ignore[union-attr]
    anchor_A = torch.tensor([20])

    def patient(row: Batch) -> torch.Tensor:
        past, at_L = histories_until(row, anchor_A, torch.ones(row.num_events, dtype=torch.bool))
        return model.pooling(model.backbone(row)[at_L], past, model.backbone.embedding)[0]  # type: ignore[misc]

    later = torch.arange(40) > 20
    other = replace(row, code_L=torch.where(later, 3, row.code_L), value_L=torch.where(later, 9.0, row.value_L))
    torch.testing.assert_close(patient(other), patient(row))
    moved_L = torch.where(later, row.time_hours_L + 20 * 8766, row.time_hours_L)
    much_later = replace(row, time_hours_L=moved_L, age_years_A=row.age_years_A + 20)
    torch.testing.assert_close(patient(much_later), patient(row))
    events = {name: value[:21] for name, value in vars(row).items() if name.endswith("_L")}
    passed = (row.time_hours_L[39] - row.time_hours_L[20]) / 8766
    ended = replace(
        row, **events, cu_seqlens=[0, 21], bounds=torch.tensor([0, 21]), age_years_A=row.age_years_A - passed
    )
    torch.testing.assert_close(patient(ended), patient(row))
    assert not torch.allclose(patient(replace(row, code_L=torch.where(later, row.code_L, 3))), patient(row))
