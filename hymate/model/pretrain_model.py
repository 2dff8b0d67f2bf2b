"""The model that pretraining trains: the encoder with the heads and losses of the self-supervised objectives.

What the heads are asked, a row's targets, is made in `hymate.model.objectives`.

Shape legend: as in `hymate.model.encoder`; N events that are asked, A anchors, K forecast variables, or terms.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymate import ops
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.model.batch import Asked, Batch
from hymate.model.encoder import HyMaTE, PatientHead
from hymate.model.objectives import LossModel, ask, huber
from hymate.model.pooling import PatientPooling


class PretrainModel(LossModel):
    """HyMaTE with the heads of the self-supervised objectives (`hymate.model.objectives`).

    terms: the weight in the loss of each term and, 0, of its own metric: "code_loss", "code_accuracy" and so on.
    """

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig, vocab_size: int) -> None:
        super().__init__()
        self.objective = objective
        self.terms: dict[str, float] = {}
        self.backbone = HyMaTE(config, vocab_size)
        self.code_head = CodeHead(config, vocab_size) if objective.code_weight else None
        self.value_head = _event_head(config, 1) if objective.value_weight else None
        self.pooling: PatientPooling | None = None
        self.forecast_head: PatientHead | None = None
        if objective.code_weight:
            self.terms |= {"code_loss": objective.code_weight, "code_accuracy": 0.0}
        if objective.value_weight:
            self.terms |= {"value_loss": objective.value_weight, "value_mae": 0.0}
        if objective.forecast_weight:
            self.pooling = PatientPooling(config)
            self.forecast_head = PatientHead(config, self.pooling.width, 2 * objective.forecast_variables)
            weight = objective.forecast_weight
            self.terms |= {"measured_loss": weight, "forecast_loss": weight, "forecast_mae": 0.0}

    def count_targets(self, batch: Batch) -> Tensor:
        """How many targets each of `terms` has in a row: (K,), float64."""
        return self._asked(batch).count_K

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """ "sum_K": see `LossModel`."""
        asked = self._asked(batch)
        h_LD = self.backbone(replace(batch, code_L=asked.code_L), asked.hidden_L)
        sums: dict[str, Tensor] = {}
        if self.code_head is not None:
            at = asked.code_N
            sums["code_loss"], sums["code_accuracy"] = self.code_head(h_LD[at], batch.code_L[at])
        if self.value_head is not None:
            at = asked.value_N
            error = self.value_head(h_LD[at])[:, 0].float() - batch.value_L[at].clamp(-5, 5)
            sums["value_loss"], sums["value_mae"] = huber(error), error.abs().sum()
        ahead = asked.ahead
        if self.pooling is not None and self.forecast_head is not None and ahead is not None:
            patient_AME, _ = self.pooling(h_LD[ahead.at_L], ahead.past, self.backbone.embedding)
            measured_AMK, value_AMK = self.forecast_head(patient_AME).float().chunk(2, dim=2)
            members = measured_AMK.shape[1]
            target_AMK = ahead.measured_AK.float()[:, None].expand_as(measured_AMK)
            found = F.binary_cross_entropy_with_logits(measured_AMK, target_AMK, reduction="none")
            error_AMK = value_AMK - ahead.value_AK[:, None].clamp(-5, 5)
            error = error_AMK.flatten()[ahead.value_N]
            sums["measured_loss"] = found[ahead.whole_N].sum() / members
            sums["forecast_loss"], sums["forecast_mae"] = huber(error) / members, error.abs().sum() / members
        return {"sum_K": torch.stack([sums[name] for name in self.terms])}

    def ask(self, batch: Batch) -> Batch:
        """The row with its `asked`."""
        return replace(batch, asked=self._asked(batch))

    def _asked(self, batch: Batch) -> Asked:
        if batch.asked is not None:
            return batch.asked
        asked = ask(batch, self.objective, self.terms, self.backbone.config.members)
        if self.pooling is None or asked.ahead is None:
            return asked
        past = self.pooling.ask(asked.ahead.past, self.backbone.embedding)
        return replace(asked, ahead=replace(asked.ahead, past=past))


class ScoredLinear(nn.Linear):
    """A linear layer onto classes that never holds all its outputs: only how well they meet their targets."""

    def forward(self, x_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Sum of the cross-entropies of N events, and for how many the target is the likeliest code."""
        return ops.linear_cross_entropy(x_ND, self.weight, self.bias, target_N)


class CodeHead(nn.Module):
    """The head of the hidden codes: the sum of their cross-entropies, and how many of them it gets right."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.hidden = _event_head(config, 1)[:-1]
        self.out = ScoredLinear(config.d_model, vocab_size)

    def forward(self, h_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) states of the events whose codes are hidden, and these codes."""
        return self.out(self.hidden(h_ND), target_N)


def _event_head(config: ModelConfig, width_out: int) -> nn.Sequential:
    """From the states of events."""
    return nn.Sequential(
        nn.RMSNorm(config.d_model),
        nn.Linear(config.d_model, config.d_model),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.d_model, width_out),
    )
