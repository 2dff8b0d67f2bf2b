"""Masked events and forecasting targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import random_row

from hymate.batch import FIRST_CODE_ID, MASK_ID
from hymate.config import ObjectiveConfig
from hymate.objectives import forecast_targets, hide_events


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0.05, 0.9),
    span=st.floats(0, 1),
    seed=st.integers(0, 2**62),
)
@settings(max_examples=40, deadline=None)
def test_hidden_events_are_reproducible_and_leave_the_rest_alone(lengths, share, span, seed) -> None:
    row = replace(random_row(lengths), seed=seed)
    objective = ObjectiveConfig(mask_share=share, span_share=span)
    hidden, again = hide_events(row, objective), hide_events(row, objective)
    assert torch.equal(hidden.code_L, again.code_L) and torch.equal(hidden.value_L, again.value_L)
    assert hidden.code_L.any()
    assert (hidden.batch.code_L[hidden.code_L] == MASK_ID).all()
    assert torch.equal(hidden.batch.code_L[~hidden.code_L], row.code_L[~hidden.code_L])
    assert not torch.isnan(row.value_L[hidden.value_L]).any()


def test_share_of_hidden_events_is_as_configured() -> None:
    row = random_row([4000, 4000])
    for span_share in (0.0, 0.5):
        hidden = hide_events(row, ObjectiveConfig(mask_share=0.2, span_share=span_share))
        share = float((hidden.code_L | hidden.value_L).float().mean())
        assert 0.17 < share < 0.23


def test_forecast_targets_equal_a_plain_loop() -> None:
    row = random_row([30, 1, 50], vocab_size=12, seed=3)
    objective = ObjectiveConfig(forecast_weight=1.0, horizon_hours=6.0, forecast_points=5, forecast_variables=4)
    anchor_A, target_AK = forecast_targets(row, objective)
    assert anchor_A.shape == (15,)
    some = False
    for a, target_K in zip(anchor_A.tolist(), target_AK, strict=True):
        now = float(row.time_hours_L[a])
        for k in range(4):
            ahead = [
                float(row.value_L[j])
                for j in range(row.num_events)
                if row.segment_L[j] == row.segment_L[a]
                and now < float(row.time_hours_L[j]) <= now + 6.0
                and int(row.code_L[j]) == FIRST_CODE_ID + k
                and not torch.isnan(row.value_L[j])
            ]
            some |= bool(ahead)
            expected = sum(ahead) / len(ahead) if ahead else torch.nan
            torch.testing.assert_close(float(target_K[k]), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert some
