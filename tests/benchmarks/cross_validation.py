"""The benchmark's contender `distilled` against gradient boosting, cross-validated over the train and tuning stays.

    python tests/benchmarks/cross_validation.py DATA_DIR [--task mortality] [--folds 4] [--seed 0] [--quick] [key=value]

Of each fold's other patients 600, or a quarter where that is less, choose the checkpoint and boosting's number of
trees, all else is for training; the held-out split is not touched. Pretraining is one for all folds, on the inputs of
the train split. Prints a Markdown table of boosting, the last checkpoint and the best one, each recalibrated on those
600: areas, means over the folds, their differences to boosting with the 95 % interval over patients resampled within
each fold, and the calibration error of all folds' probabilities together. key=value change the benchmark's
configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from hymate import baselines, metrics, trust
from hymate.bundle import read_weights
from hymate.command import load
from hymate.data.examples import Examples, labelled_examples, united
from hymate.data.features import FeatureConfig, choose, features
from hymate.data.histories import Histories
from hymate.data.tasks import labels
from hymate.predict import score
from hymate.storage import locate
from hymate.telemetry import Telemetry
from hymate.training import engine
from hymate.training.benchmark import BenchmarkConfig, pretrain, trial_of
from hymate.training.checkpoint import load_weights
from hymate.training.comparison import Run
from hymate.training.finetune import Start, labelled_rows, risk_model, taught, train_on
from hymate.training.pretraining import read_vocabulary

TUNING_SUBJECTS, SAMPLES = 600, 500
QUICK = ["pretrain.max_steps=4", "pretrain.warmup_steps=1", "pretrain.eval_every=4", "train.max_steps=4"]
QUICK += ["train.warmup_steps=1", "train.eval_every=2"]
Fold = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]  # subjects, labels, and what each model makes of them


def folds_of(everyone: Examples, folds: int, fold: int) -> tuple[Examples, Examples, Examples]:
    """Training, tuning and test examples; a subject is in one of them."""
    subjects = np.unique(everyone.subject_id_E)
    order = np.random.default_rng(0).permutation(subjects)
    test, others = order[fold::folds], np.delete(order, np.s_[fold::folds])
    tuning = np.random.default_rng(fold).permutation(others)[: min(TUNING_SUBJECTS, len(others) // 4)]
    of_test, of_tuning = (np.isin(everyone.subject_id_E, some) for some in (test, tuning))
    return everyone.only(~of_test & ~of_tuning), everyone.only(of_tuning), everyone.only(of_test)


def cross_validate(config: BenchmarkConfig, folds: int, fold: int, seed: int, weights: str) -> Fold:
    torch.set_num_threads(1)
    histories, table = Histories.open(config.data.path), labels(locate(config.data.path), config.task).table
    parts = [labelled_examples(histories, table, split) for split in ("train", "tuning")]
    joined: dict[str, Any] = {
        name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0]) if name != "dropped"
    }
    training, tuning, test = folds_of(united([dataclasses.replace(parts[0], **joined)]), folds, fold)

    spec = choose(histories, training, FeatureConfig())
    told, told_tuning, told_test = (features(histories, part, spec) for part in (training, tuning, test))
    boosting = baselines.fit("gradient_boosting", told, told_tuning, seed)
    tuning_E, test_E = (boosting.probability(table.value_EX) for table in (told_tuning, told_test))
    recalibration = trust.recalibrate(tuning.label_E, trust.logit(tuning_E))
    scores = {"gradient boosting": recalibration.probability(test_E)}

    contender = config.contenders["distilled"]
    vocabulary = read_vocabulary(config.data)
    start = Start(config.model_of(contender), config.data, vocabulary, read_weights(Path(weights)))
    trial = trial_of(config, contender, start, Run("distilled", 1.0, seed))
    teacher_E = baselines.cross_fitted(histories, training, tuning, seed)
    rows = [labelled_rows(start, trial, histories, examples) for examples in (tuning, test)]
    scored: list[tuple[float, np.ndarray]] = []  # a checkpoint's mean on the tuning examples, its test probabilities
    with tempfile.TemporaryDirectory() as folder, engine.single_process(config.train.use_gpu) as worker:

        def report(metrics: dict[str, float], checkpoint: Path) -> None:
            model = risk_model(start, trial)
            load_weights(model, checkpoint)
            tuning_E, test_E = (score(model.eval(), part, worker.device).logit_ET[:, 0] for part in rows)
            recalibrated_E = expit(trust.recalibrate(tuning.label_E, tuning_E)(test_E))
            scored.append((metrics["mean"], recalibrated_E))
            shutil.rmtree(checkpoint)

        train_on(
            start,
            trial,
            histories,
            taught(training, teacher_E, trial.teacher_share),
            tuning,
            metric="mean",
            worker=worker,
            report=report,
            resume=None,
            telemetry=Telemetry(Path(folder), enabled=False),
        )
    scores["HyMaTE, the last checkpoint"] = scored[-1][1]
    scores["HyMaTE, the best on the tuning examples"] = max(scored, key=lambda each: each[0])[1]
    return test.subject_id_E, test.label_E, scores


def pretrain_once(config: BenchmarkConfig, seed: int) -> None:
    """In a process of its own; what it returns stays in the run's folder."""
    pretrain(config, seed)


def areas(results: list[Fold], name: str, at: list[np.ndarray]) -> np.ndarray:
    """AUROC and AUPRC, mean over the folds, of some labels of each."""
    of_fold = [
        [area(label_N[rows], scores[name][rows]) for area in (metrics.auroc, metrics.auprc)]
        for (_, label_N, scores), rows in zip(results, at, strict=True)
    ]
    return np.mean(np.array(of_fold, dtype=float), axis=0)


def resampled(subject_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of as many subjects, drawn with replacement."""
    subject_P, subject_of_N = np.unique(subject_N, return_inverse=True)
    times_N = np.bincount(rng.choice(len(subject_P), len(subject_P)), minlength=len(subject_P))[subject_of_N]
    return np.repeat(np.arange(len(subject_N)), times_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared dataset")
    parser.add_argument("--task", default="mortality")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options, changes = parser.parse_known_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"task={options.task}", f"data.path={options.data.absolute()}", f"run.dir={folder}"]
        config = load("benchmark", settings + (QUICK if options.quick else []) + changes, BenchmarkConfig)
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
            pool.apply(pretrain_once, (config, options.seed))
            weights = str(config.run.path / "pretrained" / f"{options.seed}.safetensors")
            tasks = [(config, options.folds, fold, options.seed, weights) for fold in range(options.folds)]
            results: list[Fold] = pool.starmap(cross_validate, tasks, chunksize=1)
    everyone = [np.arange(len(label_N)) for _, label_N, _ in results]
    rng = np.random.default_rng(0)
    samples = [[resampled(subject_N, rng) for subject_N, _, _ in results] for _ in range(SAMPLES)]
    label_N = np.concatenate([label_N for _, label_N, _ in results])
    print("| model | AUROC | AUPRC | less boosting's: AUROC | AUPRC | calibration error |\n|---|---|---|---|---|---|")
    reference = "gradient boosting"
    for name in results[0][-1]:
        found = areas(results, name, everyone)
        error = metrics.ece(label_N, np.concatenate([scores[name] for _, _, scores in results]))
        cells = [f"{value:.4f}" for value in found] + ["", "", f"{error:.3f}"]
        if name != reference:
            difference = found - areas(results, reference, everyone)
            drawn = [areas(results, name, at) - areas(results, reference, at) for at in samples]
            low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
            triples = zip(difference, low, high, strict=True)
            cells[2:4] = [f"{value:.4f} [{least:.4f}, {most:.4f}]" for value, least, most in triples]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
