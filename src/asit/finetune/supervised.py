"""Supervised training of a classifier as a `Trainable`: losses on soft labels, layer-wise decay, averaged weights.

Letters: R rows, T frames, F mel bins, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.config import ResolvedFinetuneSettings
from asit.config.finetune_settings import ResolvedFinetuneOptim
from asit.errors import CheckpointError
from asit.finetune.finetune_dataset import FinetuneBatch
from asit.model.classifier import Classifier
from asit.runtime import Precision, World
from asit.training import compilation, distributed, optim
from asit.training.trainable import Now, Rates, StepOutput, Trainable, not_finite


def smooth(target: Tensor, share: float) -> Tensor:
    """(R, C) targets, of each of which `share` is spread evenly over all classes (arXiv 1512.00567)."""
    return target * (1.0 - share) + target.sum(1, keepdim=True) * (share / target.shape[1]) if share else target


def classification_loss(logits: Tensor, target: Tensor, kind: Literal["ce", "bce"]) -> Tensor:
    """Mean loss over rows, in float32; soft targets count with their weights under both kinds.

    Args:
        logits: (R, C).
        target: (R, C) in [0, 1].
        kind: "ce": minus the sum over classes of target x log softmax; "bce": the mean over classes of the binary
            cross-entropy of the sigmoid.
    """
    if kind == "ce":
        return -(target * F.log_softmax(logits.float(), dim=1)).sum(1).mean()
    return F.binary_cross_entropy_with_logits(logits.float(), target)


class Supervised(Trainable):
    """A classifier and its training as the loop sees it.

    Args:
        network: encoder and head.
        settings: checked and resolved.
        device: where the network lives.
    """

    def __init__(self, network: Classifier, settings: ResolvedFinetuneSettings, device: torch.device) -> None:
        self.settings = settings
        self.network = network.to(device)
        self.averaged: Classifier | None = None
        if settings.optim.average != "none":
            self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.seen = torch.zeros((), dtype=torch.int64)
        """Updates of the averaged weights."""
        names = [name for name, _ in self.network.named_parameters()]
        self._scales = optim.layer_scales(
            names, self.network.encoder.depth, settings.optim.layer_decay, settings.optim.head_lr
        )
        self._forward: nn.Module = self.network
        self._plain = self.network
        self.parallel, self.checkpoint_activations = settings.parallel, settings.checkpoint_activations
        if compilation.wanted(settings.compile, device):
            compilation.compiled(list(self.network.encoder.blocks))

    def scored(self) -> Classifier:
        """Return the network that is scored and saved: the averaged one once it has weights, else the one in training.

        Where it is sharded this is a copy, and every process must call this.
        """
        network = self.averaged if self.averaged is not None and int(self.seen) else self.network
        return distributed.unsharded(network, lambda: copy.deepcopy(self._plain))

    # called by the loop

    def trainable(self) -> nn.Module:
        """The classifier in training."""
        return self.network

    def followers(self) -> list[nn.Module]:
        """The averaged network."""
        return [] if self.averaged is None else [self.averaged]

    def distribute(self, world: World) -> None:
        """Share the work between the processes of the world."""
        if world.size > 1 and self.parallel == "fsdp":
            self._plain = copy.deepcopy(self.network).to("cpu")
        super().distribute(world)

    def rates(self, now: Now) -> Rates:
        """Learning rate and weight decay."""
        return Rates(learning_rate(self.settings.optim, now), self.settings.optim.weight_decay)

    def lr_scale(self, name: str) -> float:
        """Layer-wise decay of the learning rate."""
        return self._scales[name]

    def step(self, batch: FinetuneBatch, now: Now, precision: Precision, world: World) -> StepOutput:
        """The loss of a micro-batch."""
        self.network.train()
        with precision.autocast(batch.x.device):
            logits = self._forward(batch.x, drop=batch.factors, dropout=batch.dropout)
        settings = self.settings.loss
        loss = classification_loss(logits, smooth(batch.target, settings.smoothing), settings.kind)
        parts: dict[str, Tensor] = {}
        if now.measure and self.settings.labels != "multi":
            # Mixed clips count by the label of larger weight.
            parts["train_accuracy"] = (logits.argmax(1) == batch.target.argmax(1)).float().mean()
        return StepOutput(loss, parts)

    @torch.no_grad()
    def after_update(self, now: Now, world: World) -> None:
        """Update the averaged weights (EMA, or the mean over the ends of epochs)."""
        if self.averaged is None:
            return
        done, settings = now.step + 1, self.settings.optim
        ours: list[Tensor] = list(self.averaged.parameters())
        theirs: list[Tensor] = list(self.network.parameters())
        if settings.average == "ema":
            # At first the mean of all so far, so that the initial weights soon lose their influence.
            share = max(1.0 - settings.ema, 1.0 / (int(self.seen) + 1))
        elif done % now.steps_per_epoch == 0 and done / now.steps_per_epoch >= settings.average_from:
            share = 1.0 / (int(self.seen) + 1)
        else:
            return
        torch._foreach_lerp_(distributed.own(ours), distributed.own(theirs), share)
        self.seen += 1

    def modules(self) -> list[tuple[str, nn.Module]]:
        """The network, and the averaged one."""
        return [("network", self.network), *([("averaged", self.averaged)] if self.averaged is not None else [])]

    def state(self) -> dict[str, Tensor]:
        """The modules, and the number of averaged updates."""
        return super().state() | ({} if self.averaged is None else {"seen": self.seen})

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `state` back.

        Raises:
            CheckpointError: anything is missing, unknown or of another shape.
        """
        super().load_state(tensors)
        if self.averaged is not None:
            seen = tensors.get("seen")
            if seen is None or seen.shape != self.seen.shape or seen.dtype != self.seen.dtype:
                raise CheckpointError(
                    "the checkpoint does not say over how many updates the weights are averaged",
                    f"its tensor task/seen of {self.seen.dtype}",
                    "resume from an older checkpoint: remove this one's folder and resume again",
                )
            self.seen = seen.clone()

    def suspects(self, batch: FinetuneBatch) -> list[str]:
        """Return the clips whose input is not finite; all clips where every input is finite."""
        return not_finite(batch.x, batch.ids)


def learning_rate(settings: ResolvedFinetuneOptim, now: Now) -> float:
    """The learning rate at a step: linear warm-up, then half a cosine or steps."""
    warmup = round(settings.warmup * now.steps_per_epoch)
    if settings.schedule == "cosine" or now.step < warmup:
        return optim.warmup_then("cosine", settings.lr, min(settings.min_lr, settings.lr), now.step, warmup, now.total)
    return optim.stepped(settings.lr, now.epoch, settings.step_from, settings.step_every, settings.step_factor)
