# %% [markdown]
# # Train a classifier with synthetic outliers
#
# A classifier answers with one of its classes, whatever the image shows. Trained also with synthetic outliers, it can
# learn to give low confidence to images that belong to no class. This example goes through the whole chain on the
# built-in sample in less than a minute: a class-conditional diffusion model, outliers from it, two classifiers, and a
# comparison of both.
#
# The networks here are trained for seconds, so that **the numbers mean nothing**; the presets named below are the
# ones to use. [Classifiers](../classifiers.md) and the [results](../results.md) say what to expect of them.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torchvision.utils import make_grid

import farout
from farout.evaluation.metrics import detection_metrics

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output/synthetic_outliers")
train, test = "sample_fashion:train@classes=0,2,4-7", "sample_fashion:test@classes=0,2,4-7"
new_classes = "sample_fashion:test@classes=1,8"

# %% [markdown]
# ## The generator
#
# A class-conditional diffusion model of the labelled images. The preset `classes` trains it for 4,000 steps at full
# size.

# %%
generator = farout.train_diffusion(
    train,
    out / "generator",
    model=farout.DiffusionConfig(classes=True, size=16, schedule="linear", beta_start=1e-4, beta_end=0.02),
    training=farout.TrainingConfig(steps=60, batch_size=32, learning_rate=2e-3, ema=0.9),
)

# %% [markdown]
# ## The outliers
#
# `ClassNoise` adds noise to the embedding of a class and decodes the result, which is the simplest synthesizer.
# `NCIS`, `DreamOOD` and `SONA` have the same interface. Each writes the images, a manifest and a page.

# %%
outliers = farout.ClassNoise(scale=1.0, steps=5).synthesize(train, out / "outliers", diffusion=generator, count=64)
print(outliers)

images = torch.stack(list(farout.open_source(outliers.folder / "images", limit=32)))
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.imshow(make_grid(images, nrow=8).permute(1, 2, 0))
axes.axis("off")
figure.savefig(out / "figure.png", dpi=110)

# %% [markdown]
# ## Two classifiers
#
# One is trained without and one with the outliers. The preset `ncis_tiny` trains for 2,000 steps.

# %%
training = farout.TrainingConfig(steps=40, batch_size=64, optimizer="sgd", learning_rate=0.1, ema=None)
model = farout.ClassifierConfig(network="wrn16_1")
classifiers = {
    "without outliers": farout.train_classifier(train, out / "plain", model=model, training=training),
    "with outliers": farout.train_classifier(
        train, out / "exposed", model=model, training=training, outliers=outliers.folder
    ),
}

# %% [markdown]
# ## Do they recognize classes that they have not seen?
#
# `Posthoc` scores an image by a classifier's output, here by the energy of its logits.

# %%
for name, classifier in classifiers.items():
    detector = farout.Posthoc(score="energy").fit(train, classifier=classifier, limit=600, statistics=150)
    metrics = detection_metrics(detector.score(test, limit=150).score, detector.score(new_classes, limit=150).score)
    print(f"{name}: AUROC {metrics.auroc:.3f} ({metrics.auroc_low:.3f} to {metrics.auroc_high:.3f})")
