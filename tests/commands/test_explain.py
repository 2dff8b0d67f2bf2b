"""Explanations: what the parts of a prediction sum to, what removal means, and whether known drivers are found."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import random_row, segment_of
from small_cohort import write_meds
from small_models import PAPER, SMALL, risk_model, vocabulary_of, write_risk_bundle
from trained import synthetic_cohort, trained_bundle

from hymate import explain
from hymate.command import load
from hymate.config import ModelConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.synthetic.codes import DISTRACTORS
from hymate.data.synthetic.law import CREATININE, HAEMOGLOBIN, HEART_FAILURE
from hymate.errors import ConfigError, UserError
from hymate.evaluation import explaining
from hymate.evaluation.attribution import FRACTIONS, Explainer, deletion_and_insertion, integrated_gradients
from hymate.evaluation.explaining import Measured, changes, most_important, movements
from hymate.inference.bundle import read_bundle
from hymate.inference.scoring import last_rows, predict
from hymate.model.batch import UNKNOWN_ID
from hymate.model.encoder import RiskModel
from hymate.tuning.trial import labelled_rows, trial_config

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def decided(model: RiskModel) -> RiskModel:
    """Its head tells patients apart as a trained one does."""
    model.requires_grad_(False).heads["readmission"].out.weight.mul_(20)
    return model


# ---------------------------------------------------------------------------------------- integrated gradients


@settings(max_examples=15)
@given(
    config=st.sampled_from([SMALL, PAPER]),
    lengths=lengths_lists,
    seed=st.integers(0, 100),
    statics=st.integers(0, 2),
)
def test_the_parts_sum_to_what_knowing_the_events_changes(
    config: ModelConfig, lengths: list[int], seed: int, statics: int
) -> None:
    model, row = decided(risk_model(config, vocab_size=30)), random_row(lengths, seed=seed, statics=statics)

    def nothing(like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, torch.nan)

    unknown = replace(
        row,
        code_L=torch.full_like(row.code_L, UNKNOWN_ID),
        value_L=nothing(row.value_L),
        quantile_L=nothing(row.quantile_L),
        static_code_F=torch.full_like(row.static_code_F, UNKNOWN_ID),
        static_value_F=nothing(row.static_value_F),
        static_quantile_F=nothing(row.static_quantile_F),
    )
    logit_S, unknown_S = (model(of)["logit_AT"][:, 0].numpy() for of in (row, unknown))
    found = integrated_gradients(model, row)
    assert [len(a.event_L) for a in found] == lengths
    assert [len(a.static_F) for a in found] == [statics] * len(lengths)
    parts = [a.event_L.sum() + a.static_F.sum() for a in found]
    np.testing.assert_allclose(parts, logit_S - unknown_S, atol=2e-3 * max(1.0, np.abs(logit_S - unknown_S).max()))
    np.testing.assert_allclose([a.gap for a in found], parts - (logit_S - unknown_S), atol=1e-5)


def test_the_features_of_a_pooling_over_variables_are_attributed_too() -> None:
    model, row = decided(risk_model(replace(SMALL, pooling="variables"), vocab_size=30)), random_row([5, 1, 20], seed=3)
    for found in integrated_gradients(model, row):
        assert abs(found.gap) < 0.01 * max(1.0, abs(found.logit - found.baseline))
    with torch.no_grad():  # now nothing but the pooling's features depends on the events
        model.pooling.variables.states.weight.zero_()
    for found in integrated_gradients(model, row):
        assert abs(found.event_L).max() > 1e-3
        assert abs(found.gap) < 0.01 * max(1.0, abs(found.logit - found.baseline))


@settings(max_examples=15)
@given(lengths=lengths_lists, seed=st.integers(0, 100))
def test_who_shares_the_row_changes_no_attribution(lengths: list[int], seed: int) -> None:
    model, row = decided(risk_model(SMALL, vocab_size=30)), random_row(lengths, seed=seed)
    for s, packed in enumerate(integrated_gradients(model, row, num_steps=4)):
        (alone,) = integrated_gradients(model, segment_of(row, s), num_steps=4)
        for name in ("event_L", "static_F", "attention_L"):
            np.testing.assert_allclose(getattr(packed, name), getattr(alone, name), atol=1e-5, err_msg=name)
        assert packed.attention_L is not None and packed.attention_L.sum() == pytest.approx(1, abs=1e-5)


def test_events_out_of_the_model_s_sight_have_no_part() -> None:
    """The last state of one attention block sees `window` events; what the model cannot tell apart counts nothing."""
    window = 6
    model = decided(risk_model(replace(SMALL, layers="A", window=window, pooling="last"), vocab_size=30))
    row = random_row([20, 4])
    row.code_L[17], row.value_L[17], row.quantile_L[17] = UNKNOWN_ID, torch.nan, torch.nan
    long, short = integrated_gradients(model, row)
    seen = np.flatnonzero(long.event_L)
    # an event sees those at most `window` - 1 before it
    assert seen.tolist() == [14, 15, 16, 18, 19], seen
    assert (short.event_L != 0).all() and long.attention_L is None


# ----------------------------------------------------------------------------------------------------- removal


@pytest.fixture(scope="module")
def bundle(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = vocabulary_of(small_data)
    state = decided(risk_model(vocab_size=vocabulary.size)).state_dict()
    return write_risk_bundle(tmp_path_factory.mktemp("risk") / "bundle", vocabulary, state=state)


def held_out(data: Path) -> tuple[Histories, Examples]:
    histories = Histories.open(data)
    return histories, labelled_examples(histories, read_labels(data / "labels" / "readmission"), "held_out")


def test_removal_is_scoring_a_record_in_which_it_never_was(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    raw = write_meds(tmp_path / "raw")
    for shard in (raw / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(shard).filter(pc.field("code") != "LAB//sodium"), shard)
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(tmp_path / "data"), workers=1))
    loaded = read_bundle(bundle)

    def logits(folder: Path) -> dict[tuple[int, int], float]:
        histories, examples = held_out(folder)
        outputs = predict(loaded, histories, examples, CPU)
        keys = zip(examples.subject_id_E.tolist(), examples.prediction_time_E.tolist(), strict=True)
        return dict(zip(keys, outputs.logit_ET[:, 0].tolist(), strict=True))

    histories, examples = held_out(small_data)
    explainer = Explainer(loaded, histories, CPU)
    sodium = histories.codes.index("LAB//sodium")
    before, after = logits(small_data), logits(tmp_path / "data")
    differences = []
    for case in explainer.cases(examples, np.arange(len(examples))):
        effects = explainer.effects(case, [sodium])
        key = (case.history.subject_id, case.time_us)
        differences.append(before[key] - after[key])
        assert effects.get(sodium, 0.0) == pytest.approx(differences[-1], abs=2e-5)
    assert np.std(differences) > 0.01


@pytest.mark.parametrize("model", [SMALL, PAPER])
def test_training_prediction_and_explanation_read_the_same_events(
    model: ModelConfig, small_data: Path, tmp_path: Path
) -> None:
    """Histories are longer than the context: with two labels of one history the earlier sees fewer events."""
    loaded = read_bundle(write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data), model, context=10))
    histories, examples = held_out(small_data)
    train = TrainConfig(max_steps=1, warmup_steps=0, eval_every=1)
    trial = trial_config([TaskConfig("readmission")], train, loaded, {})
    training, predicting = labelled_rows(loaded, trial, histories, examples), last_rows(loaded, histories, examples)
    shared = 0
    for (one, _), (other, _) in zip(training.once(0, 1), predicting.once(0, 1), strict=True):
        assert torch.equal(one.code_L, other.code_L) and torch.equal(one.example_A, other.example_A)
        assert torch.equal(one.last_of_answers, other.last_of_answers)
        shared += len(one.example_A) - one.num_segments
    assert (shared > 10) == (not model.sees_ahead)
    explainer = Explainer(loaded, histories, CPU)
    cases = explainer.cases(examples, np.arange(len(examples)))
    assert any(len(case.history) < 10 for case in cases) == (not model.sees_ahead)
    outputs = predict(loaded, histories, examples, CPU)
    np.testing.assert_allclose(explainer.logits(cases), outputs.logit_ET[:, 0], rtol=1e-4, atol=1e-5)


def test_curves_score_what_is_left_of_the_history(small_data: Path, bundle: Path) -> None:
    histories, examples = held_out(small_data)
    explainer = Explainer(read_bundle(bundle), histories, CPU)
    (case,) = explainer.cases(examples, np.array([3]))
    L = len(case.history)
    importance = np.arange(L)[::-1].astype(float)  # the first event is the most important
    deleted_GN, inserted_GN = deletion_and_insertion(explainer, [case], [importance])
    for fraction, (deleted,), (inserted,) in zip(FRACTIONS, deleted_GN, inserted_GN, strict=True):
        count = max(1, round(fraction * L))
        parts = [replace(case, history=case.history.keep(part)) for part in (slice(count, L), slice(0, count))]
        np.testing.assert_allclose([deleted, inserted], explainer.logits(parts), atol=1e-5)


# ----------------------------------------------------------------------------------------------------- command


def explained(bundle: Path, data: Path, out: Path, *overrides: str) -> None:
    given_ = ["task=readmission", f"bundle={bundle}", f"data.path={data}", f"out={out}", *overrides]
    explain.run(load("explain", given_, explain.ExplainConfig))


def test_the_command_leaves_tables_pictures_and_a_report(
    small_data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "patients").mkdir(mode=0o700, parents=True)
    (tmp_path / "out" / "patients" / "patient-3.png").write_text("of an earlier command")
    explained(bundle, small_data, tmp_path / "out", "num_predictions=10", "num_subjects=2")
    pictures = ["faithfulness.png", "importance.png", "patients/patient-1.png", "patients/patient-2.png"]
    tables = ["explanation.md", "patients/events.parquet", "variables.parquet"]
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(pictures + tables)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert (tmp_path / "out" / "patients").stat().st_mode & 0o077 == 0

    histories, examples = held_out(small_data)
    outputs = predict(read_bundle(bundle), histories, examples, CPU)
    highest = np.argsort(-outputs.logit_ET[:, 0])
    second = highest[examples.subject_id_E[highest] != examples.subject_id_E[highest[0]]][0]
    events = pq.read_table(tmp_path / "out" / "patients" / "events.parquet")
    for patient, example in ((1, highest[0]), (2, second)):
        own = events.filter(pc.field("patient") == patient).to_pydict()
        assert set(own["subject_id"]) == {examples.subject_id_E[example]}
        (history,) = histories.read(examples.position_E[[example]])
        seen = history.keep(slice(examples.stop_E[example]))
        assert own["code"] == [histories.codes[code] for code in seen.code]
        assert np.array_equal(own["numeric_value"], seen.value)
        assert sum(own["attention"]) == pytest.approx(1, abs=1e-5)

    report = (tmp_path / "out" / "explanation.md").read_text()
    assert "10 predictions of the split held_out" in report and "| random |" in report
    assert all(f"`{code}`" in report for code in histories.codes)
    said = capsys.readouterr()
    assert "10 predictions explained" in said.out
    assert not any(
        f"{subject_id}" in (said.out + said.err).split() for subject_id in set(events["subject_id"].to_pylist())
    )


def test_a_birth_with_a_suffix_is_the_birth(small_data: Path, bundle: Path) -> None:
    histories = Histories.open(small_data)
    assert Explainer(read_bundle(bundle), histories, CPU).birth_code is None
    histories.codes += ["MEDS_BIRTHDAY", "MEDS_BIRTH//HOME"]
    assert Explainer(read_bundle(bundle), histories, CPU).birth_code == len(histories.codes) - 1


def test_patients_can_be_asked_for(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    _, examples = held_out(small_data)
    wanted = sorted(set(examples.subject_id_E.tolist()))[5:7]
    explained(bundle, small_data, tmp_path / "out", "num_predictions=2", f"subjects={wanted}")
    events = pq.read_table(tmp_path / "out" / "patients" / "events.parquet")
    assert set(events["subject_id"].to_pylist()) == set(wanted)


def test_parts_and_a_meds_folder_change_nothing(
    small_data: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes, of a folder that was never prepared: the tables of one process and prepared data."""
    few = ["num_predictions=6", "num_subjects=1"]
    explained(bundle, small_data, tmp_path / "whole", *few, "workers=1")
    monkeypatch.setattr(explaining, "PART", 2)
    monkeypatch.setattr(explaining, "WORTH_PARTS", 1)
    raw, labels = write_meds(tmp_path / "raw"), small_data / "labels" / "readmission"
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    asked = bundle, raw, tmp_path / "parts", *few, f"task.labels={labels}"
    with monkeypatch.context() as interrupting:
        interrupting.setattr(explaining, "most_important", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            explained(*asked, "workers=1")
    assert (tmp_path / ".parts.parts").stat().st_mode & 0o077 == 0
    with monkeypatch.context() as patch:
        patch.setattr(explaining, "_attribute", Mock(side_effect=AssertionError))  # nothing is done again
        explained(*asked, "workers=2")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts", "raw", "tmp"}
    for name in ("variables.parquet", "patients/events.parquet"):
        one, other = (pq.read_table(tmp_path / out / name).to_pydict() for out in ("whole", "parts"))
        for column, values in one.items():
            if column == "code" and name.startswith("variables"):  # as important as others, to the last digit
                assert sorted(other[column]) == sorted(values)
            elif isinstance(values[-1], float):
                np.testing.assert_allclose(np.array(other[column], float), np.array(values, float), atol=1e-5)
            else:
                assert other[column] == values
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="has no prediction in split=held_out"):
        explained(bundle, raw, tmp_path / "again" / "out", "subjects=[77777]", f"task.labels={labels}")
    assert not list((tmp_path / "again").iterdir())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["subjects=[85,77777]"], r"subjects\[1\] has no prediction in split=held_out"),
        (["task=mortality"], "the bundle predicts readmission, not task=mortality"),
        (["num_predictions=0"], "num_predictions must be positive"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    small_data: Path, bundle: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises((UserError, ConfigError), match=said) as refused:
        explained(bundle, small_data, tmp_path / "out", *overrides)
    assert "\n" not in str(refused.value) and "77777" not in str(refused.value)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- known law


@pytest.mark.slow
def test_planted_drivers_rank_before_planted_distractors_and_the_order_is_faithful(tmp_path: Path) -> None:
    """The whole claim, on a longer training, is measured by tests/benchmarks/faithfulness.py."""
    data = synthetic_cohort(tmp_path, subjects=1500)
    bundle = trained_bundle(data, steps=200)  # of more labels each than rows have segments: longer, it overfits
    histories = Histories.open(data)
    examples = labelled_examples(histories, read_labels(data / "labels" / "readmission"), "held_out")
    explainer = Explainer(bundle, histories, CPU)
    cases = explainer.cases(examples, np.arange(0, len(examples), len(examples) // 30))
    attributions = explainer.attributions(cases)

    removed = most_important(explainer, cases, attributions)
    moved = movements(explainer, cases, attributions, np.random.default_rng(0))
    measured = Measured(attributions, removed, changes(explainer, cases, removed), moved)
    table = explain.variable_table(explainer, cases, measured).to_pandas().set_index("code")
    for measure in ("mean_abs_attribution", "mean_abs_change"):
        size = table[measure].fillna(0).sort_values(ascending=False)
        assert {CREATININE, HAEMOGLOBIN, HEART_FAILURE} <= set(size.index[:4]), size
        assert size[HEART_FAILURE] > 2 * size[list(DISTRACTORS)].max(), size
    assert table.loc[HEART_FAILURE, "mean_change"] > 0

    curves = explain.faithfulness(measured)
    for measure in (explain.FALL, explain.RISE):
        others = max(curve.mean() for order, curve in curves[measure].items() if order != "attribution")
        assert curves[measure]["attribution"].mean() > others + 0.3, curves
