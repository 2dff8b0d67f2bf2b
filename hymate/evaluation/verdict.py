"""The verdict on one task in a few sentences, and the tables behind it.

`found` is the task's part of results.json: `metrics.scores` and `decisions.assess` of the held-out split, and as
"boosting" the result of `boosting.compare`, or why it was left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hymate.evaluation.decisions import ENOUGH_POSITIVES, ENOUGH_SUBJECTS, FEWEST_SUBJECTS
from hymate.evaluation.metrics import AREAS
from hymate.evaluation.tables import markdown, number, percent, percent_with_interval, with_interval

VERDICT_AIM = 0.9  # the specificity whose operating point is in the verdict
GROUPS_A_KIND = 8  # shown, the largest; results.json has all
NAMED = 3  # groups that the verdict names of each kind of trouble


def verdict(found: Mapping[str, Any]) -> str:
    """How good the model is, whether boosting would do, for whom and where the model is wrong, in a few sentences
    (Markdown).
    """
    if found["auroc"]["value"] is None:
        return "The held-out labels are all of one class, so the model can't be judged."
    parts = {
        "How good.": _ranking(found),
        "Would gradient boosting do?": _boosting(found),
        "Probabilities.": _probabilities(found),
        "Alerts.": _alerts(found),
        "Worth.": _worth(found),
        "For whom.": _groups(found),
    }
    return "\n".join(f"- **{name}** {text}" for name, text in parts.items())


def sections(found: Mapping[str, Any]) -> list[str]:
    """The tables of operating points, net benefit, groups, as Markdown parts."""
    return [
        "## Operating points",
        "Thresholds chosen on the tuning split; everything else measured on the held-out split.",
        markdown(_operating_rows(found)),
        "## Net benefit",
        "True positives per 100 predictions, less false positives weighed by the odds of the threshold; treat-none is "
        "0. Each interval holds for its threshold alone. The verdict first tests whether the ranking is chance, then "
        "whether the model helps at the prevalence, where treat-all equals treat-none, and then around it.",
        markdown(_benefit_rows(found)),
        "## Groups",
        f"Sensitivity is measured at the threshold for {percent(VERDICT_AIM)} specificity. (few): under "
        f"{ENOUGH_POSITIVES} patients with a positive label or {ENOUGH_SUBJECTS} in all, too few to judge the group. "
        f"Groups under {FEWEST_SUBJECTS} patients are not shown. Each interval holds for its group alone; whether "
        "risks are too high or too low, or patients ranked worse, allows for the number of groups.",
        markdown(_group_rows(found)),
    ]


# ---------------------------------------------------------------------------------------------------- sentences


def _ranking(found: Mapping[str, Any]) -> str:
    return (
        f"Of {found['num_labels']:,} held-out predictions for {found['num_subjects']:,} patients "
        f"{found['num_positives']:,} are positive ({percent(found['prevalence'])}). AUROC is "
        f"{with_interval(found['auroc'])}: the chance that a positive is ranked above a negative; guessing gives 0.5. "
        f"AUPRC is {with_interval(found['auprc'])}; guessing gives {number(found['prevalence'])}."
    )


def _boosting(found: Mapping[str, Any]) -> str:
    boosting = found["boosting"]
    if "left_out" in boosting:
        return f"Not compared: {boosting['left_out']}. `python -m hymate.baselines` fits it on the same labels."
    difference = boosting["difference"]
    ahead = [name.upper() for name in AREAS if (difference[name]["ci"] or [0])[0] > 0]
    behind = [name.upper() for name in AREAS if (difference[name]["ci"] or [0])[-1] < 0]
    if ahead and behind:
        answer = f"It depends: this model is ahead in {ahead[0]} and behind in {behind[0]}."
    elif ahead:
        answer = f"Not as well: this model is ahead in {' and '.join(ahead)}."
    elif behind:
        answer = (
            f"Yes, even better: this model is behind in {' and '.join(behind)}, so rank these patients by boosting."
        )
    elif "note" in found:
        answer = "Unclear: no difference can be shown, and with so few patients only a large one could be."
    else:
        answer = "Yes, as far as these patients show: no difference can be shown, and boosting is simpler."
    return (
        f"{answer} On {boosting['num_features']:,} aggregate features of the same histories and labels, in "
        f"{boosting['seconds']:.1f} s, boosting reaches AUROC {with_interval(boosting['auroc'])} and AUPRC "
        f"{with_interval(boosting['auprc'])} on the same held-out predictions. This model minus boosting: AUROC "
        f"{with_interval(difference['auroc'])}, AUPRC {with_interval(difference['auprc'])} (95 % for "
        "both intervals together)." + (" Predicted days were not compared." if "days" in found else "")
    )


def _probabilities(found: Mapping[str, Any]) -> str:
    calibration = found["calibration"]
    return (
        f"The mean predicted risk is {percent(calibration['predicted'])}, the observed one "
        f"{percent_with_interval(calibration['observed'])}. The expected calibration error is "
        f"{number(calibration['ece'])}; by chance alone a perfect model would have {number(calibration['by_chance'])} "
        f"with as many labels, so {number(calibration['beyond_chance'])} remains. The calibration slope is "
        f"{with_interval(calibration['slope'])} (1 is ideal; below 1, risks are too extreme)."
    )


def _alerts(found: Mapping[str, Any]) -> str:
    point = next(point for point in found["operating_points"] if point["aim"] == VERDICT_AIM)
    return (
        f"At a threshold of {percent(point['threshold'])}, chosen for {percent(VERDICT_AIM)} specificity on the tuning "
        f"split, {point['alerts_per_100']:.0f} of 100 predictions are alerts. They find "
        f"{percent_with_interval(point['sensitivity'])} of the positives (sensitivity), and "
        f"{percent_with_interval(point['ppv'])} of them are right (PPV). Specificity is "
        f"{percent_with_interval(point['specificity'])}."
    )


def _worth(found: Mapping[str, Any]) -> str:
    if found["useful"] is None:
        return "Around the prevalence, net benefit does not detectably exceed treat-all and treat-none."
    low, high = map(percent, found["useful"])
    thresholds = f"at a threshold of {low}" if low == high else f"at thresholds from {low} to {high}"
    return f"Net benefit exceeds treat-all and treat-none {thresholds}."


def _groups(found: Mapping[str, Any]) -> str:
    groups = [group for group in found["subgroups"] if not group["few"]]
    if not groups:
        return f"There are no groups of {FEWEST_SUBJECTS} patients: neither ages nor sexes are recorded."
    texts = []
    for wrong in ("too high", "too low"):
        off = sorted((g for g in groups if g["wrong"] == wrong), key=lambda g: -abs(_gap(g)))[:NAMED]
        names = "; ".join(
            f"{_name(g)} ({percent(g['predicted'])} predicted, {percent_with_interval(g['observed'])} observed)"
            for g in off
        )
        texts += [f"On average {wrong} for {names}."] if off else []
    worse = sorted((g for g in groups if g["ranked_worse"]), key=lambda g: g["auroc"]["value"])[:NAMED]
    if worse:
        names = "; ".join(f"{_name(group)} (AUROC {with_interval(group['auroc'])})" for group in worse)
        texts.append(f"Ranks worse for {names}.")
    if not texts:
        texts.append(
            f"In none of {len(groups)} groups are risks detectably wrong on average, or ranked worse than overall."
        )
    small = sum(not group["enough"] for group in groups)
    if small:
        texts.append(f"{small} of {len(groups)} groups are too small to judge.")
    return " ".join(texts)


def _gap(group: Mapping[str, Any]) -> float:
    return float(group["predicted"] - group["observed"]["value"])


# ------------------------------------------------------------------------------------------------------- tables


def _operating_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["aimed specificity", "risk above", "specificity", "sensitivity", "PPV", "alerts per 100"]]
    for point in found["operating_points"]:
        shares = (percent_with_interval(point[name]) for name in ("specificity", "sensitivity", "ppv"))
        rows.append([percent(point["aim"]), percent(point["threshold"]), *shares, f"{point['alerts_per_100']:.1f}"])
    return rows


def _benefit_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["threshold", "model", "treat-all", "gain over the better of treat-all and treat-none"]]
    for row in found["net_benefit"]:
        gain, ci = row["gain"]["value"], row["gain"]["ci"]
        shown = f"{100 * gain:.1f}" + (f" [{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]" if ci else "")
        rows.append([percent(row["threshold"]), f"{100 * row['model']:.1f}", f"{100 * row['all']:.1f}", shown])
    return rows


def _group_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["group", "labels", "positives", "observed", "predicted", "AUROC [95 % CI]", "sensitivity"]]
    for kind in dict.fromkeys(group["kind"] for group in found["subgroups"]):
        own = [group for group in found["subgroups"] if group["kind"] == kind]
        shown = sorted(own, key=lambda group: -group.get("labels", 0))[:GROUPS_A_KIND]
        rows += [_group_row(group) for group in own if group in shown]
        if len(own) > len(shown):
            rows.append([f"{len(own) - len(shown)} smaller ones (results.json)", *[""] * 6])
    return rows


def _group_row(group: Mapping[str, Any]) -> list[str]:
    if group["few"]:
        return [_name(group), f"below {FEWEST_SUBJECTS} patients", *[""] * 5]
    return [
        _name(group) + ("" if group["enough"] else " (few)"),
        f"{group['labels']:,}",
        f"{group['positives']:,}",
        percent_with_interval(group["observed"]),
        percent(group["predicted"]) + (f", {group['wrong']}" if group["wrong"] else ""),
        with_interval(group["auroc"]),
        percent_with_interval(group["sensitivity"]),
    ]


def _name(group: Mapping[str, Any]) -> str:
    """Codes name themselves; ages and what is not recorded need their kind."""
    code = group["kind"] != "age" and group["group"] != "not recorded"
    return str(group["group"]) if code else f"{group['kind']} {group['group']}"
