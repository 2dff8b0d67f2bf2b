"""The report: its verdict, and how labels came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from small_cohort import SIZES
from stays import LAB, task, write_histories

from hymate.data.examples import Examples
from hymate.data.tasks import read_or_extract_labels
from hymate.evaluation import decisions, metrics, report, results
from hymate.evaluation.report import verdict


def judged(model_noise: float, boosting_noise: float, num_labels: int = 600) -> dict[str, Any]:
    """The results of a model and of boosting that both see the true risk, through noise."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-0.5, 2, num_labels)
    label, subject = (rng.random(num_labels) < expit(logit)).astype(float), np.arange(num_labels)
    model, boosting = (expit(logit + rng.normal(0, noise, num_labels)) for noise in (model_noise, boosting_noise))
    found = metrics.scores(label, model, subject) | decisions.assess(
        label, model, subject, {}, decisions.thresholds(label, model)
    )
    beside = {**metrics.scores(label, boosting, subject), "num_features": 1234, "seconds": 5.4, "num_fitted": 900}
    found |= {"splits": {"train": {"labels": 900}}}
    return found | {"boosting": beside | {"difference": metrics.paired_difference(label, model, boosting, subject)}}


@pytest.mark.parametrize(
    ("model_noise", "boosting_noise", "said"),
    [
        (0.0, 4.0, "Not as well: this model is ahead in AUROC and AUPRC."),
        (4.0, 0.0, "Yes, even better: this model is behind in AUROC and AUPRC, so rank these patients by boosting."),
        (
            1.0,
            1.0,
            "Yes, as far as these patients show: no difference can be shown, and boosting is simpler.",
        ),
    ],
)
def test_the_verdict_says_whether_boosting_would_do(model_noise: float, boosting_noise: float, said: str) -> None:
    found = judged(model_noise, boosting_noise)
    line = of_boosting(found)
    assert line.startswith(f"- **Would gradient boosting do?** {said} On 1,234 aggregate features")
    low, high = found["boosting"]["difference"]["auprc"]["ci"]
    assert f"AUROC {found['boosting']['auroc']['value']:.3f} [" in line and f"[{low:.3f}, {high:.3f}]" in line


@pytest.mark.parametrize(
    ("useful", "said"),
    [
        (
            None,
            "Around the prevalence, net benefit does not detectably exceed treat-all and treat-none.",
        ),
        ([0.08, 0.32], "treat-all and treat-none at thresholds from 8.0 % to 32 %."),
        ([0.25, 0.254], "treat-all and treat-none at a threshold of 25 %."),
    ],
)
def test_the_verdict_says_from_which_risks_acting_on_the_model_is_worth_it(
    useful: list[float] | None, said: str
) -> None:
    line = next(line for line in verdict(judged(1.0, 1.0) | {"useful": useful}).splitlines() if "Worth" in line)
    assert line.endswith(said)


def test_the_verdict_on_boosting_where_measures_disagree_or_are_missing() -> None:
    found = judged(1.0, 1.0, num_labels=30)
    assert "Unclear" in of_boosting(found | {"note": "too few"})
    apart = {"auroc": {"value": 0.1, "ci": [0.01, 0.2]}, "auprc": {"value": -0.1, "ci": [-0.2, -0.01]}}
    disagree = found | {"boosting": found["boosting"] | {"difference": apart}}
    assert "It depends: this model is ahead in AUROC and behind in AUPRC." in of_boosting(disagree)
    assert "Predicted days were not compared" in of_boosting(found | {"days": {}})
    left_out = of_boosting(found | {"boosting": {"left_out": "report.boosting=false"}})
    assert "Not compared: report.boosting=false. `python -m hymate.baselines`" in left_out


def test_groups_that_are_too_small_are_no_reassurance() -> None:
    group = {"kind": "sex", "group": "GENDER//F", "hidden": False, "wrong": None, "ranked_worse": False}
    small, large = (group | {"judged": enough} for enough in (False, True))

    def said(*groups: dict[str, Any]) -> str:
        lines = verdict(judged(1.0, 1.0) | {"subgroups": list(groups)}).splitlines()
        return next(line for line in lines if "For whom" in line)

    assert said(small, small).endswith("** All 2 groups are too small to judge.")
    assert "In none of 1 groups are risks detectably wrong" in said(small, large)
    assert said(small, large).endswith("1 of 2 groups are too small to judge.")


def test_a_report_without_groups_has_no_table_of_them() -> None:
    found, group = judged(1.0, 1.0), {"kind": "sex", "group": "GENDER//F", "hidden": True}
    assert "## Groups" not in report.sections(found)
    assert "## Groups" in report.sections(found | {"subgroups": [group]})


def test_the_report_says_how_labels_came_about(tmp_path: Path) -> None:
    home, back = "HOSPITAL_DISCHARGE//HOME", "HOSPITAL_ADMISSION//EU OBSERVATION"
    write_histories(
        tmp_path, [[(0, home), (9, back), (80, LAB)], [(0, home), (0.1, back), (80, LAB)], [(0, home), (9, LAB)]]
    )
    config = task("readmission")
    found = read_or_extract_labels(tmp_path, config)
    label, subject = np.array([1.0, 0.0]), np.array([1, 2])
    nobody = Examples(
        position_E=subject,
        stop_E=subject,
        earliest_E=subject,
        prediction_time_E=subject,
        label_ET=label[:, None],
        days_ET=np.full((2, 1), np.nan),
        weight_ET=np.ones((2, 1)),
        subject_id_E=subject,
    )
    scores = metrics.scores(label, label, subject)
    part = results.of_task(config, scores, found, dict.fromkeys(SIZES, nobody), "tuning")
    part |= {"recalibration": {"temperature": 1.0, "shift": 0.0, "ece_before": 0.0}, "boosting": None, "picture": None}
    outcome = results.TrialEnd(0, {}, "finished", 2, {"mean": 1.0, "step": 2}, None, None)
    more = {"known": ["billing: 3 events moved to the end of their stay"], "initial_weights": "new"}
    written = report.report(results.collect([part], "mean", [outcome], outcome) | more)
    for text in (
        "- billing: 3 events moved to the end of their stay",
        "| 3 | times at which the task's trigger occurs |",
        "| 1 | the record ends inside the label window, without a death there: no label, with the event or without |",
        "Excluded by window: input 0, transfer 1, target 0.",
        "by kind, also where left out: observation 1, planned 0.",
        "Events that each predicate matches: hospital_admission 2, hospital_discharge 3, observation 2, planned 0, ",
        "**No event matches died: check the codes.**",
        "there are no held-out labels",
    ):
        assert text in written, text


def of_boosting(found: dict[str, Any]) -> str:
    """The verdict's line."""
    (line,) = [line for line in verdict(found).splitlines() if "gradient boosting" in line]
    return line
