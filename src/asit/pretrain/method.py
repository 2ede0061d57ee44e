"""ASiT as a `Trainable`: a student that sees corrupted views, an EMA teacher that sees clean ones, three losses.

Source: arXiv 2211.13189 and, for settings that the paper leaves open, the two versions of the official code; every
departure from them is a setting (`asit.config`) or is noted in the code. Letters: B clips, V global views,
L local views, R = V * B rows, P patches, K prototypes, T frames, F mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from asit.config import ResolvedPretrainSettings
from asit.data.loading.sampler import OBJECTIVE
from asit.io.checkpoint import load_strict
from asit.model.encoders import empty_encoder
from asit.model.vit import Encoder, cut
from asit.pretrain import chunked_loss, losses, masking, token_selection
from asit.pretrain.networks import Networks, Outputs
from asit.pretrain.pretrain_dataset import GLOBAL_VIEWS, PretrainBatch
from asit.runtime import Precision, World
from asit.training import compilation, distributed, optim
from asit.training.trainable import Now, Rates, StepOutput, Trainable, not_finite


class ASiT(Trainable):
    """The method as the loop sees it.

    Args:
        settings: checked and resolved.
        frames: T of a global view.
        generator: of the initial weights.
        device: where the networks live.
        fill: loads other first weights into the encoder, on the CPU.
    """

    def __init__(
        self,
        settings: ResolvedPretrainSettings,
        frames: int,
        generator: torch.Generator,
        device: torch.device,
        fill: Callable[[Encoder], None] | None = None,
    ) -> None:
        self.settings = settings
        self.frames = frames
        student = Networks(settings, frames, reconstruct=True)
        student.encoder.init_weights(generator)
        if fill is not None:
            fill(student.encoder)
        for head in (student.projection, student.reconstruction, student.decoder, student.objective):
            if head is not None:
                head.init_weights(generator)
        self.student = student.to(device)
        self.teacher: Networks | None = None
        if student.projection is not None or (student.objective is not None and student.objective.needs_teacher):
            self.teacher = Networks(settings, frames, reconstruct=False).to(device)
            wanted = self.teacher.state_dict()
            load_strict(
                self.teacher, {k: v for k, v in self.student.state_dict().items() if k in wanted}, "the teacher"
            )
            self.teacher.requires_grad_(False)
        self.parallel, self.checkpoint_activations = settings.parallel, settings.checkpoint_activations
        heads = settings.heads
        self.class_centre = losses.Centre(heads.class_prototypes).to(device)
        patch_prototypes = heads.class_prototypes if heads.share_prototypes else heads.patch_prototypes
        self.patch_centre = losses.Centre(patch_prototypes).to(device)
        self._forward: nn.Module = self.student
        self._pass = (-1, 0)
        if compilation.wanted(settings.compile, device):
            blocks = [block for network in (self.student, self.teacher) if network for block in network.encoder.blocks]
            blocks += self.student.decoder.blocks if self.student.decoder is not None else []
            compilation.compiled(blocks)

    # called by the loop

    def trainable(self) -> nn.Module:
        """The student."""
        return self.student

    def followers(self) -> list[nn.Module]:
        """The teacher."""
        return [] if self.teacher is None else [self.teacher]

    def rates(self, now: Now) -> Rates:
        """Learning rate and weight decay, and the teacher's momentum and temperature."""
        return schedules(self.settings, now)

    def step(self, batch: PretrainBatch, now: Now, precision: Precision, world: World) -> StepOutput:
        """Return the three losses of a micro-batch, and the gauges when they are measured."""
        weights, rates = self.settings.losses, self.rates(now)
        device = batch.clean.device
        corrupted = self._corrupted(batch)
        corrupted_mask = batch.drop | batch.replace
        copies, chosen = self.settings.masking.copies, batch.tokens
        asked = None if chosen is None else chosen.repeat(copies, 1)
        covered, over = self._counted(corrupted_mask, asked, world)
        rebuilt: Tensor | None = None
        # Their number must be known to the host, which on a GPU would wait for it.
        if weights.reconstruction_tokens == "masked" and device.type == "cpu":
            rebuilt = token_selection.touched(corrupted_mask, self.student.encoder.patch).flatten().nonzero().flatten()
        taught: Outputs | None = None
        with precision.autocast(device):
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(batch.clean, chosen=chosen)
            given = None
            if self.student.objective is not None:
                given = None if taught is None else taught.tokens, batch, self._generator(now.step, device, world)
            seen = self._forward(corrupted, batch.local, batch.factors, batch.keep, asked, rebuilt, given)
        parts: dict[str, Tensor] = {}
        gauges: dict[str, Tensor] = {}
        loss = torch.zeros((), device=device)
        temperature = rates.others["teacher_temperature"]
        if taught is not None and taught.class_logits is not None:
            probs = losses.teacher_distribution(taught.class_logits, self.class_centre.value, temperature)
            self.class_centre.collect(taught.class_logits)
            views = list(seen.class_logits.chunk(copies * GLOBAL_VIEWS))
            if seen.local_class_logits is not None:
                views += list(seen.local_class_logits.chunk(self.settings.views.local_views))
            teacher_views = probs.unflatten(0, (GLOBAL_VIEWS, -1))
            parts["global"] = losses.global_loss(views, teacher_views, weights.student_temperature, copies)
            loss = loss + weights.global_weight * parts["global"]
            if now.measure:
                gauges["teacher_entropy_class"] = losses.entropy(probs).mean()
                gauges["centre_norm_class"] = torch.linalg.vector_norm(self.class_centre.value)
        if taught is not None and taught.patches is not None:
            counted = None if covered is None else (covered, over["local"])
            parts["local"], entropy = chunked_loss.local_loss(
                seen.patches,
                taught.patches,
                self.patch_centre.value,
                (weights.student_temperature, temperature),
                dtype=torch.bfloat16 if precision.name == "bf16" else torch.float32,
                counted=counted,
                measure=now.measure,
            )
            self.patch_centre.collect(*taught.patches)
            loss = loss + weights.local_weight * parts["local"]
            if now.measure:
                gauges["teacher_entropy_patch"] = entropy
                gauges["centre_norm_patch"] = torch.linalg.vector_norm(self.patch_centre.value)
        if seen.reconstruction is not None:
            target, mask = token_selection.copied(batch.clean, copies), corrupted_mask
            if rebuilt is not None:
                patch = self.student.encoder.patch
                target, mask = (cut(one, patch).flatten(0, 1).index_select(0, rebuilt) for one in (target, mask))
            parts["reconstruction"] = losses.masked_l1(seen.reconstruction, target, mask, over["reconstruction"])
            loss = loss + weights.reconstruction_weight * parts["reconstruction"]
        if seen.custom is not None:
            parts["objective"] = seen.custom.float()
            loss = loss + self.settings.custom.objective_weight * parts["objective"]
        if now.measure:
            gauges["feature_spread"] = spread((taught or seen).class_token)
            gauges["mask_share"] = corrupted_mask.float().mean()
        return StepOutput(loss, parts | gauges)

    def _generator(self, step: int, device: torch.device, world: World) -> torch.Generator:
        """Return a generator for the objective of one's own, seeded by the step, the process and the pass."""
        self._pass = (step, self._pass[1] + 1 if self._pass[0] == step else 0)
        seed = np.random.SeedSequence([self.settings.seed, OBJECTIVE, *self._pass, world.rank])
        return torch.Generator(device).manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def _corrupted(self, batch: PretrainBatch) -> Tensor:
        """What the student sees, (M * R, 1, T, F)."""
        drawn = (batch.drop, batch.replace, batch.donor)
        return masking.corrupt(batch.clean, *drawn, self.settings.masking.fill, batch.noise, batch.others)

    def _counted(
        self, corrupted: Tensor, asked: Tensor | None, world: World
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the tokens that the local loss counts (None: all), and each loss's mean count over processes."""
        covered: Tensor | None = None
        counts: dict[str, Tensor] = {}
        if self.settings.losses.local_tokens == "masked" and self.student.wants_patch:
            covered = masking.token_mask(corrupted, self.student.encoder.patch)
            covered = (covered if asked is None else covered.gather(1, asked)).flatten()
            counts["local"] = covered.sum()
        if self.student.reconstruction is not None:
            counts["reconstruction"] = corrupted.sum()
        if not counts:
            return covered, counts
        totals = torch.stack(list(counts.values())).float()
        world.sum_(totals)
        return covered, dict(zip(counts, totals / world.size, strict=True))

    def gradients_ready(self, now: Now) -> None:
        """Keep the projection's last layers fixed for the first epochs (DINO; in v1 this never took effect)."""
        if self.student.projection is not None and now.epoch < self.settings.optim.freeze_last_layer:
            for parameter in self.student.projection.last_layers():
                parameter.grad = None

    @torch.no_grad()
    def after_update(self, now: Now, world: World) -> None:
        """Update the teacher by EMA of the student, and the centres by EMA of the teacher's logits (centring)."""
        if self.teacher is None:
            return
        momentum = self.rates(now).others["teacher_momentum"]
        student, teacher = dict(self.student.named_parameters()), dict(self.teacher.named_parameters())
        ours = [student[name] for name in teacher]  # matched by name, each time, since sharding replaces parameters
        torch._foreach_lerp_(distributed.own(list(teacher.values())), distributed.own(ours), 1.0 - momentum)
        wanted = ((self.class_centre, self.teacher.wants_class), (self.patch_centre, self.teacher.wants_patch))
        centres = [centre for centre, has_loss in wanted if has_loss]
        if centres:
            losses.update_centres(centres, self.settings.losses.centre_momentum, world.sum_)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Student, teacher and centres."""
        out: list[tuple[str, nn.Module]] = [("student", self.student)]
        if self.teacher is not None:
            out += [("teacher", self.teacher), ("class_centre", self.class_centre), ("patch_centre", self.patch_centre)]
        return out

    def suspects(self, batch: PretrainBatch) -> list[str]:
        """Return the clips whose views are not finite; all clips where every view is finite."""
        return not_finite(batch.clean, batch.ids)

    @torch.no_grad()
    def picture(self, batch: PretrainBatch, precision: Precision) -> dict[str, Tensor]:
        """Return clean, corrupted, reconstructed (n, T, F) float32 and mask (n, T, F) bool of the first views."""
        corrupted = self._corrupted(batch)
        n = len(batch.ids)
        with precision.autocast(batch.clean.device):
            keep = batch.keep
            made = self.student(corrupted[:n], keep=None if keep is None else keep[:n]).reconstruction
        if made is None:
            made = torch.zeros_like(corrupted[:n])
        mask = (batch.drop | batch.replace)[:n]
        four = {"clean": batch.clean[:n], "corrupted": corrupted[:n], "reconstructed": made.float(), "mask": mask}
        return {name: x.squeeze(1).cpu() for name, x in four.items()}

    def encoder(self) -> Encoder:
        """Return the encoder that a run saves: the teacher's, or the student's where there is no teacher.

        Where it is sharded this is a copy on the CPU, and every process must call this.
        """
        encoder = (self.teacher or self.student).encoder
        mels = self.settings.front_end.mels
        return distributed.unsharded(encoder, lambda: empty_encoder(self.settings.encoder, self.frames, mels))


def schedules(settings: ResolvedPretrainSettings, now: Now) -> Rates:
    """Return every rate at a step. The learning rate is scaled by batch_size / 256 (v1, v2)."""
    o, loss = settings.optim, settings.losses
    done = now.step / now.total
    peak = o.lr * settings.batch_size / 256
    warmup = round(o.warmup * now.steps_per_epoch)
    # Officially the temperature moves once an epoch; here it moves with every step.
    warm = 1.0 if loss.teacher_warmup == 0 else now.epoch / loss.teacher_warmup
    return Rates(
        lr=optim.warmup_then(o.schedule, peak, min(o.min_lr, peak), now.step, warmup, now.total),
        weight_decay=optim.cosine(o.weight_decay, o.weight_decay_end, done),
        others={
            "teacher_momentum": optim.cosine(o.teacher_momentum, o.teacher_momentum_end, done),
            "teacher_temperature": optim.linear(loss.teacher_temperature_start, loss.teacher_temperature, warm),
        },
    )


def spread(x: Tensor) -> Tensor:
    """Return the spread of the directions of (R, D): 1 where they are uniform, 0 where all rows are the same.

    sqrt(D) times the mean over dimensions of the standard deviation over rows of x / |x|, after SimSiam
    (arXiv 2011.10566), where 1 / sqrt(D) is the value of no collapse.
    """
    unit = nn.functional.normalize(x.float(), dim=-1)
    return unit.std(0, unbiased=False).mean() * math.sqrt(x.shape[1])
