"""A history in pieces gives what it gives in one pass; a state stands for the events before it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cohort import CODES, a_history
from small_models import PAPER, SMALL, timed, vocabulary_of

from hymate import ops
from hymate.config import ModelConfig
from hymate.data.histories import History
from hymate.data.meds import US_PER_HOUR, US_PER_YEAR
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError
from hymate.inference.streaming import PatientState, StreamingModel
from hymate.model.batch import Batch
from hymate.model.encoder import RiskModel

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW, LENGTH = 5, 37
MODEL = replace(SMALL, window=WINDOW, num_queries=3)
CONFIGS = {
    "mamba2": replace(MODEL, layers="MM", window=0),
    "mamba1": replace(MODEL, layers="MM", mixer="mamba1", window=0),
    "hybrid": MODEL,
    "deep": replace(MODEL, layers="MMMA"),
    "mamba1 hybrid": replace(MODEL, mixer="mamba1"),
    "attention": replace(MODEL, layers="AA"),
    "attention to one event": replace(MODEL, layers="AM", window=1),
    "window above the history": replace(MODEL, window=512),
    "recurrent": replace(MODEL, layers="GA"),
    "timed": replace(MODEL, time_aware_scan=True),
    "mamba1, timed": replace(MODEL, mixer="mamba1", time_aware_scan=True),
    "mean": replace(MODEL, pooling="mean"),
    "last": replace(MODEL, pooling="last"),
    "variables": replace(MODEL, pooling="variables", num_queries=2),
    "elapsed": replace(MODEL, elapsed=True),
    "members": replace(MODEL, members=3),
    "members over variables": replace(MODEL, pooling="variables", num_queries=2, members=3),
    "members of the mean": replace(MODEL, pooling="mean", members=2),
    "paper, with a past": replace(PAPER, causal=True, window=WINDOW),
}


@pytest.fixture(scope="module")
def vocabulary(small_data: Path) -> Vocabulary:
    return vocabulary_of(small_data)


def model_of(config: ModelConfig, vocabulary: Vocabulary, dtype: torch.dtype = torch.float64) -> RiskModel:
    torch.manual_seed(0)
    model = RiskModel(config, vocabulary.size, ["readmission", "length_of_stay"], ["length_of_stay"])
    return timed(model).to(dtype).eval()


def outputs(streaming: StreamingModel, state: PatientState, history: History, prediction_time_us: int) -> list[float]:
    """Both tasks' logits, and the days of the second."""
    logit_T, log_days_T = streaming.outputs(state, history, prediction_time_us)
    assert np.isnan(log_days_T[0])
    return [*logit_T.tolist(), float(log_days_T[1])]


def one_pass(model: RiskModel, vocabulary: Vocabulary, history: History, prediction_time_us: int) -> list[float]:
    """The same by the ordinary forward pass over the events up to a time, as one packed row."""
    n = int(np.searchsorted(history.time, prediction_time_us, side="right"))
    dtype = next(model.parameters()).dtype
    id_L, static_id_F = (
        vocabulary.ids_of(CODES)[code].astype(np.int64) for code in (history.code, history.static_code)
    )
    values = [*vocabulary.normalise(id_L[:n], history.value[:n])]
    values += vocabulary.normalise(static_id_F, history.static_value)
    z, quantile, static_z, static_quantile = (torch.from_numpy(x).to(dtype) for x in values)
    time = history.time[:n]

    def hours(us: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(us / US_PER_HOUR).float().to(dtype)

    batch = Batch(
        code_L=torch.from_numpy(id_L[:n]),
        value_L=z,
        quantile_L=quantile,
        time_hours_L=hours(time - time[0]),
        gap_hours_L=hours(np.diff(time, prepend=time[:1])),
        segment_L=torch.zeros(n, dtype=torch.int32),
        cu_seqlens=[0, n],
        bounds=torch.tensor([0, n]),
        static_code_F=torch.from_numpy(static_id_F),
        static_value_F=static_z,
        static_quantile_F=static_quantile,
        static_segment_F=torch.zeros(len(static_id_F), dtype=torch.int32),
        age_years_A=torch.tensor([(prediction_time_us - history.birth_time) / US_PER_YEAR]),
        lag_hours_A=torch.tensor([(prediction_time_us - time[-1]) / US_PER_HOUR]),
        example_A=torch.zeros(1, dtype=torch.int64),
        label_AT=torch.ones(1, 2),
        days_AT=torch.full((1, 2), torch.nan),
        label_weight_AT=torch.ones(1, 2),
        seed_S=torch.zeros(1, dtype=torch.int64),
    )
    with torch.no_grad():
        said = model(batch)
    return [*said["logit_AT"][0].tolist(), float(said["log_days_AT"][0, 1])]


def in_pieces(
    model: RiskModel, vocabulary: Vocabulary, history: History, cuts: list[int], chunk_events: int
) -> PatientState:
    streaming = StreamingModel(model, vocabulary, CODES, chunk_events)
    state = None
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(history)]):
        if start < stop:
            state = streaming.append(state, streaming.events(history)[start:stop])
    assert state is not None
    return state


@pytest.mark.slow
@pytest.mark.parametrize("chunk_events", [1, 3, WINDOW, WINDOW + 2, 3 * WINDOW + 1, LENGTH])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_one_pass(name: str, chunk_events: int, vocabulary: Vocabulary) -> None:
    history, model = a_history(LENGTH), model_of(CONFIGS[name], vocabulary)
    now = int(history.time[-1]) + 3 * US_PER_HOUR
    streaming = StreamingModel(model, vocabulary, CODES, chunk_events)
    state = streaming.append(None, streaming.events(history))
    assert outputs(streaming, state, history, now) == pytest.approx(one_pass(model, vocabulary, history, now), abs=1e-6)


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    length=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    chunk_events=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_pieces_leave_the_state_of_one_pass(
    name: str, length: int, cuts: list[int], chunk_events: int, seed: int, vocabulary: Vocabulary
) -> None:
    """Every tensor of the state, hence all that is computed from it later."""
    history, model = a_history(length, seed), model_of(CONFIGS[name], vocabulary)
    whole = in_pieces(model, vocabulary, history, [], chunk_events=length)
    parts = in_pieces(model, vocabulary, history, [min(cut, length) for cut in cuts], chunk_events)
    torch.testing.assert_close(dataclasses.asdict(parts), dataclasses.asdict(whole), rtol=1e-8, atol=1e-8)
    now = int(history.time[-1])
    said = outputs(StreamingModel(model, vocabulary, CODES), parts, history, now)
    assert said == pytest.approx(one_pass(model, vocabulary, history, now), abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_known_history_goes_on_with_its_new_events(name: str, vocabulary: Vocabulary) -> None:
    """Scores between appends, at several times after the same events, are those of the history so far."""
    history, model = a_history(LENGTH), model_of(CONFIGS[name], vocabulary)
    streaming = StreamingModel(model, vocabulary, CODES)
    state, start = None, 0
    for stop in (1, 2, 9, 9, 20, LENGTH):
        state = streaming.append(state, streaming.events(history)[start:stop])
        so_far = replace(history, time=history.time[:stop], code=history.code[:stop], value=history.value[:stop])
        for hours_later in (0, 5):
            now = int(so_far.time[-1]) + hours_later * US_PER_HOUR
            expected = one_pass(model, vocabulary, so_far, now)
            assert outputs(streaming, state, history, now) == pytest.approx(expected, abs=1e-6)
        start = stop


def test_a_state_is_not_changed_by_what_follows(vocabulary: Vocabulary) -> None:
    history, model = a_history(LENGTH), model_of(MODEL, vocabulary)
    streaming = StreamingModel(model, vocabulary, CODES)
    events_L = streaming.events(history)
    state = streaming.append(None, events_L[:20])
    first = streaming.append(state, events_L[20:])
    again = streaming.append(state, events_L[20:])
    torch.testing.assert_close(dataclasses.asdict(first), dataclasses.asdict(again), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mamba1 hybrid", "deep", "mean", "last"])
def test_single_precision_differs_by_rounding(name: str, vocabulary: Vocabulary) -> None:
    history, model = a_history(1500), model_of(CONFIGS[name], vocabulary, torch.float32)
    now = int(history.time[-1])
    state = in_pieces(model, vocabulary, history, [1, 400], chunk_events=64)
    said = outputs(StreamingModel(model, vocabulary, CODES), state, history, now)
    assert said == pytest.approx(one_pass(model, vocabulary, history, now), abs=2e-5)


@pytest.mark.parametrize("name", ["deep", "mamba1 hybrid", "mamba2"])
def test_the_state_has_a_size_of_its_own(name: str, vocabulary: Vocabulary) -> None:
    """Once the window is full, the state has the same shapes after any number of events."""
    history, model = a_history(400), model_of(CONFIGS[name], vocabulary)
    streaming = StreamingModel(model, vocabulary, CODES, chunk_events=50)
    shapes = []
    for length in (2 * WINDOW, 400):
        state = streaming.append(None, streaming.events(history)[:length])
        tensors = [*itertools.chain.from_iterable(state.blocks), *vars(state.pooled).values()]
        shapes.append([tensor.shape for tensor in tensors])
        assert sum(t.untyped_storage().nbytes() for t in tensors) == sum(t.nbytes for t in tensors)
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_goes_on_as_over_the_whole_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 50, 2, 4, dtype=dtype)
    for window, new in itertools.product((1, 4, 7, 60), (1, 3, 20, 50)):
        whole = ops.packed_attention(q, k, v, [0, 50], window=window, causal=True)[-new:]
        seen = min(50, new + window - 1)  # what a state keeps
        parts = ops.continued_attention(q[-new:], k[-seen:], v[-seen:], window=window)
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(MODEL, window=0), "window=0"),
        (replace(MODEL, bidirectional=True), "both directions"),
        (replace(MODEL, causal=False), r"model\.causal=false"),
    ],
)
def test_models_without_a_state_of_bounded_size_are_refused(
    config: ModelConfig, said: str, vocabulary: Vocabulary
) -> None:
    with pytest.raises(UserError, match=said):
        StreamingModel(model_of(config, vocabulary), vocabulary, CODES)


def test_events_out_of_order_are_refused(vocabulary: Vocabulary) -> None:
    history = a_history(10)
    streaming = StreamingModel(model_of(MODEL, vocabulary), vocabulary, CODES)
    events_L = streaming.events(history)
    state = streaming.append(None, events_L[5:])
    for wrong in (events_L[:5], events_L[::-1]):
        with pytest.raises(UserError, match="order of their times"):
            streaming.append(state, wrong)
    with pytest.raises(UserError, match="must not lie before"):
        streaming.outputs(state, history, int(history.time[-1]) - 1)
