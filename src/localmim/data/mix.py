"""Mixup and cutmix of a batch, and the soft targets that go with them: mindcv's `Mixup`, made repeatable.

mixup (Zhang et al., 2017, https://arxiv.org/abs/1710.09412), CutMix (Yun et al., 2019, https://arxiv.org/abs/1905.04899).
mindcv's batch mode is right (tests compare it with a few lines of our own) but draws from numpy's global state. Here
that state is set from (seed, epoch, step, rank) for the call, and put back. So no other thread may draw from it
meanwhile; nothing else in this package does.
"""

from __future__ import annotations

import numpy as np
from mindcv.data.mixup import Mixup, mixup_target

from localmim.errors import UserError

MIX = 4  # purpose of the random numbers, beside those of `localmim.data.augment`


class Mix:
    """Mixes neighbours in a batch: the first image with the second, and so on.

    One weight, and for cutmix one box, for the whole batch, as timm's batch mode, which pairs the first image with the
    last. Neighbours stay together however a step is spread over devices. Without mixup and cutmix only the targets are
    made.

    Args:
        num_classes: classes K.
        mixup, cutmix: alpha of the Beta distribution that the weight is drawn from; 0: not used.
        prob: probability that a batch is mixed at all.
        switch_prob: probability of cutmix where both are used.
        label_smoothing: s; a target is 1 - s + s/K for its class and s/K for the others, before mixing.
        seed: the run's seed.
        rank: of this device; each one mixes differently.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
        seed: int = 0,
        rank: int = 0,
    ):
        self.num_classes, self.label_smoothing, self.seed, self.rank = num_classes, label_smoothing, seed, rank
        self.mixup: Mixup | None = None
        if (mixup or cutmix) and prob:
            self.mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=prob,
                switch_prob=switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: np.ndarray, labels: np.ndarray, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """A batch of one step; the arguments stay as they are.

        Args:
            images: float32 [B, C, H, W].
            labels: int [B], classes.
            epoch, step: the position in the run.

        Returns:
            images float32 [B, C, H, W] (the same array when nothing is mixed), targets float32 [B, K], rows of sum 1.

        Raises:
            UserError: an odd batch is to be mixed, or a label that is not one of the K classes.
        """
        if labels.min() < 0 or labels.max() >= self.num_classes:
            wrong = labels[(labels < 0) | (labels >= self.num_classes)][0]
            raise UserError(f"data.dir has an image of class {wrong}, expected 0 to {self.num_classes - 1}")
        if self.mixup is None:
            return images, mixup_target(labels, self.num_classes, 1.0, self.label_smoothing).astype(np.float32)
        if len(images) % 2:
            raise UserError(
                f"batch_size is {len(images)}, expected an even number: mixup and cutmix mix images in pairs"
            )
        forth = np.arange(0, len(images), 2)
        order = np.concatenate([forth, forth[::-1] + 1])  # 0 2 4 5 3 1: a mirror image of it pairs neighbours
        before = np.random.get_state()
        np.random.seed([self.seed, epoch, step, self.rank, MIX])
        try:
            mixed, targets = self.mixup(images[order], labels[order])
        finally:
            np.random.set_state(before)
        back = np.argsort(order)
        return mixed[back], targets[back]
