"""Sizes and lengths of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ...demo.scenes import CLOSE_UP_SIZE, IMAGE_SIZE


@dataclass(frozen=True)
class Stage:
    """Length and learning rate of the training of one of the two models.

    Attributes:
        steps: Number of optimizer steps.
        images: Scenes per step.
        learning_rate: Highest learning rate, reached after the warm-up.
        warmup_steps: Steps of linear warm-up.
        horizon: Step at which the half cosine that follows the warm-up is at zero.
        cooldown_steps: Last steps, in which the rate is also scaled linearly to zero, so that a run may end before its
            horizon.
        weight_decay: Weight decay of matrices; vectors and scalars have none.
        evaluate_every: Steps between two evaluations on validation scenes.
        seed: Seed of the weights and of all random order.
    """

    steps: int
    images: int
    learning_rate: float
    warmup_steps: int
    horizon: int
    cooldown_steps: int
    weight_decay: float
    evaluate_every: int = 500
    seed: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines a training run but the loss of the CLIP.

    Attributes:
        image_size: Side of the vision tower's input image in pixels; scenes are enlarged to it.
        patch_size: Side of a patch, pixels.
        vision_width: Hidden size of the vision tower; its MLP is three times as wide.
        vision_layers: Number of its layers.
        vision_heads: Number of its attention heads.
        text_width: Hidden size of CLIP's text tower, of the shared embedding and of the Llama decoder.
        text_layers: Number of layers of CLIP's text tower.
        decoder_layers: Number of layers of the Llama decoder.
        decoder_positions: Longest sequence of the Llama decoder.
        heads: Attention heads of CLIP's text tower and of the decoder.
        texts: Texts per step that the images of the step are compared with.
        letters_from: CLIP step from which on more texts name a letter, which is learned last and rarely named before.
        letter_texts: Share of the texts that name a letter from then on, if their scene has one, on top of the usual.
        region_texts: Number of these texts that the patches are compared with (`demo` only).
        questions: Highest number of questions per image and step.
        conversations_from: LLaVA step from which on questions are also asked in conversations. Earlier than that the
            image would be learned slowly, because an answer gives hints on later ones.
        clip: Training of the CLIP.
        llava: Training of the projector and the decoder.
        scenes: Number of training scenes, from the start of `TRAIN_SEEDS` on.
        close_ups: Number of close-ups of one object, from the seeds after those, for the CLIP: most captioned
            photographs show one thing, and from scenes alone a CLIP without boxes hardly learns shapes.
        close_ups_per_step: Number of close-ups per step of the CLIP, in addition to its scenes.
        monitored_scenes: Number of validation scenes during a run.
        validation_scenes: Number of validation scenes after the run.
        cache_features: Whether the features of all scenes are stored in a file instead of computed at every step.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    decoder_layers: int
    decoder_positions: int
    heads: int
    texts: int
    letters_from: int
    letter_texts: float
    region_texts: int
    questions: int
    conversations_from: int
    clip: Stage
    llava: Stage
    scenes: int
    close_ups: int
    close_ups_per_step: int
    monitored_scenes: int = 384
    validation_scenes: int = 1000
    cache_features: bool = True

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: The image is not a whole number of patches wide, or there are fewer scenes than a step takes.
        """
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, but got {self.image_size} and {self.patch_size}."
            )
        needed = max(self.clip.images, self.llava.images)
        if self.scenes < needed:
            raise ValueError(f"A step takes {needed} scenes, but scenes is {self.scenes}. Draw at least {needed}.")

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def close_up_side(self) -> int:
        """Patches along one side of a close-up."""
        return self.side * CLOSE_UP_SIZE // IMAGE_SIZE


SCALES = {
    "small": TrainingConfig(
        image_size=96,
        patch_size=8,
        vision_width=128,
        vision_layers=5,
        vision_heads=2,
        text_width=128,
        text_layers=2,
        decoder_layers=4,
        decoder_positions=512,
        heads=4,
        texts=128,
        letters_from=2300,
        letter_texts=0.35,
        region_texts=48,
        questions=14,
        conversations_from=1300,
        clip=Stage(
            steps=5500,
            images=20,
            learning_rate=1e-3,
            warmup_steps=300,
            horizon=7000,
            cooldown_steps=1500,
            weight_decay=0.05,
        ),
        llava=Stage(
            steps=1700,
            images=24,
            learning_rate=1.5e-3,
            warmup_steps=200,
            horizon=2200,
            cooldown_steps=500,
            weight_decay=0.02,
        ),
        scenes=64_000,
        close_ups=64_000,
        close_ups_per_step=48,
    ),
    "llava-1.5": TrainingConfig(
        image_size=336,
        patch_size=14,
        vision_width=384,
        vision_layers=8,
        vision_heads=6,
        text_width=384,
        text_layers=4,
        decoder_layers=6,
        decoder_positions=2048,
        heads=12,
        texts=512,
        letters_from=6000,
        letter_texts=0.35,
        region_texts=96,
        questions=16,
        conversations_from=7500,
        clip=Stage(
            steps=20_000,
            images=80,
            learning_rate=6e-4,
            warmup_steps=1000,
            horizon=24_000,
            cooldown_steps=4000,
            weight_decay=0.05,
        ),
        llava=Stage(
            steps=10_000,
            images=64,
            learning_rate=6e-4,
            warmup_steps=500,
            horizon=12_000,
            cooldown_steps=2000,
            weight_decay=0.02,
        ),
        scenes=400_000,
        close_ups=400_000,
        close_ups_per_step=192,
        cache_features=False,
    ),
}
"""Choices of `--scale`: "small" for two cores, and for a GPU the image geometry of LLaVA-1.5 (24 x 24 patches)."""

MODELS = {"demo": True, "demo-global": False}
"""Name of a model -> whether its CLIP is trained with box supervision (the region-text loss)."""


__all__ = ["MODELS", "SCALES", "Stage", "TrainingConfig"]
