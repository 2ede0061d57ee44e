"""A probe that reads every patch token: learned prototypes, each matched with the token that is most like it.

Letters: N clips, R rows of a batch, P patches (another number for each clip), D width, K prototypes, C classes.

A pooled vector says little of what is heard in a small part of a clip. Here K prototypes are compared with each of
the P tokens by cosine; of each prototype the best match over the clip is kept, and one linear layer reads the K
matches. This is prototypical probing as in "Unmute the Patch Tokens" (arXiv 2509.24901). Theirs are binarised by sign
in the forward pass, to be small; ours stay real numbers, start as drawn tokens of the training side, and tokens are
standardised first, for tokens of one encoder share a large common direction that would make all cosines alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from asit.errors import AsitError
from asit.evaluate.ridge import Floats, ProbeScores

Tokens = Sequence[NDArray[np.float16]]
"""N arrays (P, D)."""

_MOMENT_TOKENS = 200_000  # tokens that mean and deviation are measured on


@dataclass(frozen=True)
class PrototypeSettings:
    """How the probe is trained.

    Attributes:
        per_class: prototypes for each class, so that K = per_class x C ...
        most: ... and no more than this.
        lr: of Adam, falling to 0 along a cosine over all epochs.
        weight_decay: of the linear layer, decoupled.
        batch: clips a step.
        epochs: passes over the training side, ...
        steps: ... but at least as many as make so many steps (few labels), and ...
        most_epochs: ... never more than these.
        patience: share of the epochs without a lower held-out loss after which it stops.
        held_out: share of each class's training clips that choose the epoch where there is no validation side.

    The defaults were tried on 40 Arabic words at 5, 13 and 130 clips a class, scored on speakers held out of the
    training side: 5 prototypes a class did no worse than 20, and a strong weight decay better than a weak one.
    """

    per_class: int = 5
    most: int = 1024
    lr: float = 0.003
    weight_decay: float = 3.0
    batch: int = 64
    epochs: int = 20
    steps: int = 1000
    most_epochs: int = 100
    patience: float = 0.2
    held_out: float = 0.2

    def length(self, clips: int) -> int:
        """Epochs for so many training clips."""
        by_steps = -(-self.steps // -(-clips // self.batch))
        return max(self.epochs, min(self.most_epochs, by_steps))


class PrototypeHead(nn.Module):
    """Tokens (R, P, D) and which of them are there (R, P) to logits (R, C)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, start: Tensor, mean: Tensor, deviation: Tensor, classes: int) -> None:
        """`start`: (K, D) standardised tokens that prototypes begin as."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.prototypes = nn.Parameter(F.normalize(start, dim=1))
        # Matches of unit vectors lie close together: the norm brings them to the size that a linear layer learns from.
        self.norm = nn.BatchNorm1d(len(start), affine=False)
        self.weight = nn.Parameter(torch.zeros(classes, len(start)))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        unit = F.normalize((tokens - self.mean) / self.deviation, dim=2)
        matches = unit @ F.normalize(self.prototypes, dim=1).T
        best = matches.masked_fill(~valid[..., None], -2.0).amax(1)
        logits: Tensor = F.linear(self.norm(best), self.weight, self.bias)
        return logits


def prototype_probe(
    tokens: Tokens,
    train: NDArray[np.int64],
    targets: Floats,
    test: NDArray[np.int64],
    *,
    multi: bool,
    seed: int,
    validation: tuple[NDArray[np.int64], Floats] | None = None,
    settings: PrototypeSettings | None = None,
    device: torch.device | None = None,
) -> ProbeScores:
    """Train the probe on some clips and score others.

    Cross-entropy for one label a clip, binary cross-entropy for several; Adam with decoupled weight decay. The epoch
    with the lowest loss on the validation split is kept; without one, on a part held out of the training split, class
    by class. Where fewer than 10 clips could be held out (few labels), the last epoch is kept and all clips train.

    Args:
        tokens: patch tokens of all clips.
        train: (n,) rows of the training clips.
        targets: (n, C) their labels' weights; one-hot where a clip has one label.
        test: (m,) rows to score.
        multi: whether clips have several labels.
        seed: of the held-out part, the first prototypes and the order of the clips.
        validation: rows and targets to choose the epoch by.
        device: where to train; None: the CPU.

    Returns:
        Scores (m, C) as probabilities; the regularisation is the number of epochs.

    Raises:
        AsitError: no training clip, or a loss that is not finite.
    """
    settings, device = settings or PrototypeSettings(), device or torch.device("cpu")
    rng = np.random.default_rng([seed, 2])
    if not len(train):
        raise AsitError("no clip to train the prototype probe on", "at least one", "check the split")
    if validation is not None:
        held, held_targets, how = *validation, "the validation split"
    else:
        out = _held_out(targets, multi, settings.held_out, rng)
        held, held_targets, how = train[out], targets[out], "a part held out of the training split"
        train, targets = train[~out], targets[~out]
    count = min(settings.most, settings.per_class * targets.shape[1])
    head = _start(tokens, train, count, targets.shape[1], rng).to(device)
    epochs = settings.length(len(train))
    steps = -(-len(train) // settings.batch) * epochs
    optimiser = torch.optim.AdamW(
        [
            {"params": [head.prototypes, head.bias], "weight_decay": 0.0},
            {"params": [head.weight], "weight_decay": settings.weight_decay},
        ],
        lr=settings.lr,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best, best_epoch, kept = np.inf, epochs, None
    for epoch in range(1, epochs + 1):
        head.train()
        order = rng.permutation(len(train))
        for rows in np.array_split(order, -(-len(order) // settings.batch)):
            loss = _loss(head(*_batch(tokens, train[rows], device)), targets[rows], multi)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        if not np.isfinite(float(loss.detach())):
            raise AsitError(f"the prototype probe's loss is {float(loss)}", "a number", "look at the features")
        if not len(held):
            continue
        logits = _logits(head, tokens, held, settings.batch, device)
        now = float(_loss(logits, held_targets, multi))
        if now < best:
            best, best_epoch, kept = now, epoch, copy.deepcopy(head.state_dict())
        elif epoch - best_epoch >= settings.patience * epochs:
            break
    if kept is not None:
        head.load_state_dict(kept)
    logits = _logits(head, tokens, test, settings.batch, device)
    scores = (logits.sigmoid() if multi else logits.softmax(1)).cpu().numpy()
    chosen = f"loss on {how}" if len(held) else f"all {epochs} epochs: too few clips to hold some out"
    return ProbeScores(scores, float(best_epoch), chosen)


def _start(
    tokens: Tokens, train: NDArray[np.int64], count: int, classes: int, rng: np.random.Generator
) -> PrototypeHead:
    """A head whose prototypes are tokens of drawn clips, one a clip as far as that goes."""
    mixed = rng.permutation(train)
    each = max(1, _MOMENT_TOKENS // max(1, len(tokens[int(mixed[0])])))
    sample = np.concatenate([tokens[int(row)] for row in mixed[:each]]).astype(np.float32)
    mean, deviation = sample.mean(0, dtype=np.float64), sample.std(0, dtype=np.float64)
    deviation[deviation < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0
    owners = np.resize(mixed, count)
    picked = np.stack([tokens[int(row)][rng.integers(len(tokens[int(row)]))] for row in owners]).astype(np.float64)
    # Clips may be fewer than prototypes: a little noise keeps two that began as one token apart.
    start = (picked - mean) / deviation + 0.01 * rng.standard_normal(picked.shape)
    first, centre, scale = (torch.from_numpy(array.astype(np.float32)) for array in (start, mean, deviation))
    return PrototypeHead(first, centre, scale, classes)


def _held_out(targets: Floats, multi: bool, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(n,) the clips that choose the epoch: a share of each class, or of all clips where they have several labels."""
    out = np.zeros(len(targets), bool)
    if multi:
        out[rng.permutation(len(targets))[: int(share * len(targets))]] = True
    else:
        truth = targets.argmax(1)
        mixed = rng.permutation(len(truth))
        ordered = mixed[np.argsort(truth[mixed], kind="stable")]
        sizes = np.bincount(truth)
        place = np.arange(len(truth)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        out[ordered[place < np.repeat((share * sizes).astype(int), sizes)]] = True
    return out if out.sum() >= 10 else np.zeros(len(targets), bool)


def _batch(tokens: Tokens, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of these clips (R, P, D) float32, short ones filled with zeros, and which are there (R, P)."""
    found = [tokens[row] for row in rows.tolist()]
    counts = np.array([len(one) for one in found])
    out = np.zeros((len(found), counts.max(), found[0].shape[1]), np.float16)
    for place, one in zip(out, found, strict=True):
        place[: len(one)] = one
    valid = np.arange(counts.max()) < counts[:, None]
    return torch.from_numpy(out).to(device).float(), torch.from_numpy(valid).to(device)


@torch.no_grad()
def _logits(head: PrototypeHead, tokens: Tokens, rows: NDArray[np.int64], batch: int, device: torch.device) -> Tensor:
    head.eval()
    parts = [head(*_batch(tokens, rows[first : first + batch], device)) for first in range(0, len(rows), batch)]
    return torch.cat(parts) if parts else torch.empty(0, len(head.bias), device=device)


def _loss(logits: Tensor, targets: Floats, multi: bool) -> Tensor:
    wanted = torch.from_numpy(targets).to(logits.device)
    if multi:
        return F.binary_cross_entropy_with_logits(logits, wanted)
    return F.cross_entropy(logits, wanted)
