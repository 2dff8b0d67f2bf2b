"""The encoder (arXiv 2509.24118) and the risk model on it, from the parts up: mixers, block, `HyMaTE`, `RiskModel`.

The events' embedding is in `hymate.model.embedding`, the Mamba mixers in `hymate.model.mixers`, pooling into patient
vectors in `hymate.model.pooling`, the heads of pretraining in `hymate.model.pretrain_model`. configs/model/paper.yaml
is the published model; each of our changes is an option.

Shape legend (with `hymate.model.batch`):
    L  events in the packed row     S  segments (patients' windows)     F  static events
    B  batch rows of a mixer        D  d_model                          V  vocabulary size
    Q  pooling queries              E  width of the patient vector      T  tasks
    M  members: poolings and heads over the one encoder
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymate import ops
from hymate.config import ModelConfig
from hymate.errors import UserError
from hymate.model.batch import Batch
from hymate.model.embedding import EMBEDDINGS
from hymate.model.mixers import BlockState, Mamba1Mixer, Mamba2Mixer
from hymate.model.objectives import LossModel
from hymate.model.pooling import MemberLinear, PatientPooling

TYPICAL_DAYS = 5.0  # what a new head predicts, so that it need not learn the scale first


# ------------------------------------------------------------------------------------------------------ mixers


class MambaBlockMixer(nn.Module):
    """The M of a layer pattern: one Mamba mixer, or one in each direction whose outputs are added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.forwards = _mamba(config)
        self.backwards = _mamba(config) if config.bidirectional else None

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D), each segment by itself."""
        gap_hours_1L, segment_1L = batch.gap_hours_L[None], batch.segment_L[None]
        y_LD = self.forwards(x_LD[None], gap_hours_1L, segment_1L)[0]
        if self.backwards is not None:
            ahead_hours_1L = F.pad(gap_hours_1L[:, 1:], (0, 1))  # a segment's first gap is 0, so its last is, too
            y_LD = y_LD + self.backwards(x_LD[None], ahead_hours_1L, segment_1L, reverse=True)[0]
        return y_LD

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), and what they leave to those after them."""
        assert self.backwards is None, "a backward mixer would need the events to come"
        y_BLD, (conv, scan) = self.forwards.carry(x_LD[None], batch.gap_hours_L[None], state)
        return y_BLD[0], (conv.clone(), scan)  # a view would keep all of this chunk's inputs


def _mamba(c: ModelConfig) -> Mamba1Mixer | Mamba2Mixer:
    if c.mixer == "mamba1":
        return Mamba1Mixer(c.d_model, c.d_state, c.d_conv, c.expand, time_aware=c.time_aware_scan)
    widths = (c.d_model, c.d_state, c.d_conv, c.expand)
    return Mamba2Mixer(*widths, headdim=c.headdim, chunk_size=c.chunk_size, time_aware=c.time_aware_scan)


class SelfAttention(nn.Module):
    """The A of a layer pattern: multi-head attention within a segment; position comes from the events' time."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, config.window or None
        self.causal = config.causal and not config.bidirectional
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D), each segment by itself."""
        q, k, v = self.qkv(x_LD).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=1)
        y_LHE = ops.packed_attention(
            q, k, v, batch.cu_seqlens, bounds=batch.bounds, window=self.window, causal=self.causal
        )
        return self.out(y_LHE.flatten(1))

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), and what they leave to those after them."""
        assert self.window is not None and self.causal, "without a window the state would grow"
        q, k, v = self.qkv(x_LD).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=1)
        if state is not None:
            k, v = (torch.cat(past_and_now) for past_and_now in zip(state, (k, v), strict=True))
        y_LHE = ops.continued_attention(q, k, v, window=self.window)
        kept = max(0, len(k) - self.window + 1)
        return self.out(y_LHE.flatten(1)), (k[kept:].clone(), v[kept:].clone())


class GRU(nn.Module):
    """The G of a layer pattern: a gated recurrent unit (Cho et al. 2014), the baseline of the field's tables."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(config.d_model, config.d_model, batch_first=True)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D), each segment by itself."""
        # padding comes after the events and changes none of them; on a CPU torch's packed sequences take twice as long
        padded_SLD = nn.utils.rnn.pad_sequence(x_LD.split(batch.lengths), batch_first=True)
        segment_L = batch.segment_L.long()
        place_L = torch.arange(len(x_LD), device=x_LD.device) - batch.bounds[segment_L]
        return self.out(self.gru(padded_SLD)[0][segment_L, place_L])

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), and what they leave to those after them."""
        y_BLD, h_1BD = self.gru(x_LD[None], state[0] if state else None)
        return self.out(y_BLD[0]), (h_1BD, h_1BD.new_empty(0))


# ----------------------------------------------------------------------------------------------------- encoder


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, d_model: int, ratio: float) -> None:
        super().__init__()
        hidden = int(d_model * ratio)
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.silu(gate))


class ResidualDropout(nn.Module):
    """Add a branch to the residual stream; in training, elements of the branch are dropped."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Both of one shape."""
        return ops.add_dropout(x, branch, self.p if self.training else 0.0)


MIXERS: dict[str, Callable[[ModelConfig], MambaBlockMixer | SelfAttention | GRU]] = {
    "M": MambaBlockMixer,
    "A": SelfAttention,
    "G": GRU,
}


class Block(nn.Module):
    """Pre-norm mixer, then pre-norm gated MLP (none where mlp_ratio is 0), each added to its input."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model)
        self.mixer = MIXERS[kind](config)
        self.mlp: GatedMLP | None = None
        if config.mlp_ratio:
            self.mlp_norm = nn.RMSNorm(config.d_model)
            self.mlp = GatedMLP(config.d_model, config.mlp_ratio)
        self.add = ResidualDropout(config.dropout)

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D)."""
        x_LD = self.add(x_LD, self.mixer(self.mixer_norm(x_LD), batch))
        return x_LD if self.mlp is None else self.add(x_LD, self.mlp(self.mlp_norm(x_LD)))

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), without dropout, and what they leave to those after them."""
        mixed_LD, state = self.mixer.carry(self.mixer_norm(x_LD), batch, state)
        x_LD = x_LD + mixed_LD
        return x_LD if self.mlp is None else x_LD + self.mlp(self.mlp_norm(x_LD)), state


class HyMaTE(nn.Module):
    """The encoder: events of packed patient histories -> their contextual states.

    Args:
        config: widths and layer pattern.
        vocab_size: V, ids including the unknown and the mask id.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = EMBEDDINGS[config.embedding](vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layers)
        self.norm = nn.RMSNorm(config.d_model)
        for block in self.blocks:
            _scale_residual(block, len(self.blocks) * (2 if config.mlp_ratio else 1))

    def encode(self, batch: Batch, hidden_L: Tensor | None = None) -> Tensor:
        """Contextual event states (L, D); hidden_L: bool, events whose value the model must not see."""
        h_LD = self._embed(batch, hidden_L)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                h_LD = checkpoint(block, h_LD, batch, use_reentrant=False)
            else:
                h_LD = block(h_LD, batch)
        return self.norm(h_LD)

    forward = encode

    def carry(self, batch: Batch, states: Sequence[BlockState] | None) -> tuple[Tensor, tuple[BlockState, ...]]:
        """`encode` for a history (one segment) that goes on from the events that left `states`, None at its start.

        Returns the contextual states (L, D) of its next events and what the blocks carry on.
        """
        h_LD, carried = self._embed(batch), []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            h_LD, state = block.carry(h_LD, batch, states[number] if states else None)
            carried.append(state)
        return self.norm(h_LD), tuple(carried)

    def _embed(self, batch: Batch, hidden_L: Tensor | None = None) -> Tensor:
        events = (batch.code_L, batch.value_L, batch.quantile_L)
        return self.embedding(*events, hidden_L, batch.time_hours_L, batch.gap_hours_L)


def _scale_residual(block: nn.Module, num_branches: int) -> None:
    """Shrink what each of the encoder's branches adds, so that the residual stream keeps its size (GPT-2)."""
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if name.endswith(("out_proj.weight", "out.weight", "down.weight")):
                weight.div_(math.sqrt(num_branches))


# -------------------------------------------------------------------------------------------------- risk model


class PatientHead(nn.Module):
    """Each member's outputs of its patient vectors."""

    def __init__(self, config: ModelConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width_in, elementwise_affine=False)
        self.hidden = MemberLinear(config.members, width_in, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.out = MemberLinear(config.members, config.d_model, width_out)

    def forward(self, patient_AME: Tensor) -> Tensor:
        """(S, M, E) -> (S, M, O)."""
        return self.out(self.dropout(F.gelu(self.hidden(self.norm(patient_AME)))))


class RiskModel(LossModel):
    """HyMaTE with one head for each task: its logit, and for the tasks `in_days` also log(1 + days).

    What the members say is averaged; each learns as if it were alone (deep ensembles, Lakshminarayanan et al. 2017).

    terms: the weight in the loss of each task's "TASK/loss" and, in days, "TASK/days_loss". The loss is the mean over
    tasks of the weighted mean over a task's labels.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, tasks: Sequence[str], in_days: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.backbone = HyMaTE(config, vocab_size)
        self.pooling = PatientPooling(config)
        self.heads = nn.ModuleDict({task: _task_head(config, self.pooling.width, task in in_days) for task in tasks})
        self._in_days = [number for number, task in enumerate(tasks) if task in in_days]
        names = [f"{task}/loss" for task in tasks] + [f"{tasks[number]}/days_loss" for number in self._in_days]
        self.terms = dict.fromkeys(names, 1 / len(tasks))

    def ask(self, batch: Batch) -> Batch:
        """The row with what the pooling needs."""
        return self.pooling.ask(batch, self.backbone.embedding)

    def patient(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Patient vectors (S, M, E) and attention weights (L, M * Q) or None."""
        return self.pooling(self.backbone(batch), batch, self.backbone.embedding)

    def outputs(self, patient_AME: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and log(1 + days), NaN for tasks without days: float32 (S, T) each."""
        logit_ATM, log_days_ATM = self._of_members(patient_AME)
        return logit_ATM.mean(dim=2), log_days_ATM.mean(dim=2)

    def _of_members(self, patient_AME: Tensor) -> tuple[Tensor, Tensor]:
        out = [head(patient_AME).float() for head in self.heads.values()]
        days = [o_SMO[..., 1] if o_SMO.shape[2] == 2 else torch.full_like(o_SMO[..., 0], torch.nan) for o_SMO in out]
        return torch.stack([o_SMO[..., 0] for o_SMO in out], dim=1), torch.stack(days, dim=1)

    def count_targets(self, batch: Batch) -> Tensor:
        """The sum of the weights of the labels that each of `terms` has in a row: (K,), float64."""
        return torch.cat([_weighed(target_SX, w_SX).sum(0) for target_SX, w_SX in self._targets(batch)]).double()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """ "logit_AT", "log_days_AT" and "sum_K": the weighted sum over labels of the binary cross-entropy and, for
        days, of the Huber loss of their logarithms; of members the mean of theirs.
        """
        logit_ATM, log_days_ATM = self._of_members(self.patient(batch)[0])

        def summed(error: Callable[..., Tensor], predicted_SXM: Tensor, target_SX: Tensor, weight_SX: Tensor) -> Tensor:
            target_SXM = torch.nan_to_num(target_SX)[:, :, None].expand_as(predicted_SXM)
            error_SX = error(predicted_SXM, target_SXM, reduction="none").mean(dim=2)
            return (error_SX * _weighed(target_SX, weight_SX)).sum(dim=0)

        labels, days = self._targets(batch)
        risks = summed(F.binary_cross_entropy_with_logits, logit_ATM, *labels)
        sum_K = torch.cat([risks, summed(F.huber_loss, self._of_days(log_days_ATM), *days)])
        logit_AT, log_days_AT = logit_ATM.mean(dim=2), log_days_ATM.mean(dim=2)
        if not self.training:
            logit_AT, log_days_AT = logit_AT.detach(), log_days_AT.detach()
        return {"sum_K": sum_K, "logit_AT": logit_AT, "log_days_AT": log_days_AT}

    def _targets(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Labels and their weights; the logarithms of days and theirs, of the tasks that have them."""
        log_days_SX = self._of_days(batch.days_AT).log1p()
        return (batch.label_AT, batch.label_weight_AT), (log_days_SX, self._of_days(batch.label_weight_AT))

    def _of_days(self, x_ST: Tensor) -> Tensor:
        """The columns of the tasks that have days; slices, for a list of indices would be sent to the device."""
        return torch.cat([x_ST[:, :0], *(x_ST[:, task : task + 1] for task in self._in_days)], dim=1)

    def recalibrate(self, task: str, temperature: float, shift: float) -> None:
        """Make the task's logits what they are now / temperature + shift, by its head's last weights."""
        head = self.heads[task]
        assert isinstance(head, PatientHead)
        last, bias = head.out, head.out.bias
        assert bias is not None
        with torch.no_grad():
            last.weight[:, :, 0] /= temperature
            bias[:, 0] = bias[:, 0] / temperature + shift


def _weighed(target_SX: Tensor, weight_SX: Tensor) -> Tensor:
    """The weights of the targets that are there, 0 of others."""
    return torch.where(target_SX.isnan(), 0.0, weight_SX)


def _task_head(config: ModelConfig, width_in: int, in_days: bool) -> PatientHead:
    head = PatientHead(config, width_in, 2 if in_days else 1)
    if in_days:
        assert head.out.bias is not None
        nn.init.constant_(head.out.bias[:, 1], math.log1p(TYPICAL_DAYS))
    return head


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor], others: Sequence[str] = ("pooling",)) -> None:
    """Copy the backbone's weights out of a pretrained model's state, and those of other parts where it has the same.

    Raises UserError when the backbone's don't fit.
    """
    assert isinstance(model.backbone, HyMaTE)
    weights = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    own = model.backbone.state_dict()
    for name in own:
        if name not in weights or weights[name].shape != own[name].shape:
            raise UserError(
                f"the pretrained weights do not fit this model at backbone.{name}: use the model and vocabulary "
                "settings of the run they come from"
            )
    model.backbone.load_state_dict(weights)
    for part in others:
        weights = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        new = getattr(model, part).state_dict()
        if {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in new.items()}:
            getattr(model, part).load_state_dict(weights)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; biases, norms, embeddings and the scan's own weights (A_log, D, dt_bias,
    time_weight) never do.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or id(p) in embeddings or name.endswith(("A_log", "bias", "time_weight"))
            (kept if plain else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
