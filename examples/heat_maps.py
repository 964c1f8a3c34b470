# %% [markdown]
# # Read heat maps
#
# Normal images that look alike, and defects that cover a small part of an image: `patches` says where in an image the
# features differ from those of normal images. Here the normal images are the boots of the built-in sample, and a
# defect is a square from the image of a digit.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import farout
from farout.data.batching import iterate_batches
from farout.evaluation.metrics import auroc

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output/heat_maps")
out.mkdir(parents=True, exist_ok=True)
boots = torch.stack(list(farout.open_source("sample_fashion:test@classes=9", limit=30)))  # (B, 1, 28, 28), uint8
digits = torch.stack(list(farout.open_source("sample_digits:test", limit=30)))
defective, mask = boots.clone(), torch.zeros(30, 28, 28, dtype=torch.bool)
for index in range(30):
    top, left = 12 + index % 5, 4 + index % 12
    defective[index, :, top : top + 8, left : left + 8] = digits[index, :, 10:18, 10:18]
    mask[index, top : top + 8, left : left + 8] = True

# %% [markdown]
# ## Fit
#
# A few dozen images are enough to start with. `alpha` is the rate of false alarms: a small one requires more
# calibration images than this example has.

# %%
detector = farout.Patches(epochs=10, positions=8000, bank=4000).fit(
    "sample_fashion:train@classes=9", limit=90, statistics=30, alpha=0.2
)

# %% [markdown]
# ## Score
#
# The score of an image is the mean of the highest 1 % of its map, so that a small defect has an effect.

# %%
normal_scores, defect_scores = detector.score(boots), detector.score(defective)
print(f"images: AUROC {auroc(normal_scores.score, defect_scores.score):.3f}")
print(
    f"flagged: {defect_scores.is_ood.mean():.0%} of the defects, {normal_scores.is_ood.mean():.0%} of the normal images"
)

# %% [markdown]
# ## Maps
#
# The values of a map are standard deviations above the mean error at normal positions: 0 is normal, and 3 is rare.
# Maps have no p-values; compare them between images on one color scale.

# %%
source = farout.open_source(defective)
maps = torch.cat(
    [detector.measure(batch, maps=True).maps for batch in iterate_batches(source, detector.preprocessing, 8)]
)
maps = torch.nn.functional.interpolate(maps[:, None].float(), size=(28, 28), mode="bilinear")[:, 0]
print(f"pixels: AUROC {auroc(maps[~mask], maps[mask]):.3f}")

figure, axes = plt.subplots(2, 6, figsize=(8, 3), layout="constrained")
for column in range(6):
    axes[0, column].imshow(defective[column, 0], cmap="gray")
    drawn = axes[1, column].imshow(maps[column], cmap="magma", vmin=0, vmax=6)
    for row in range(2):
        axes[row, column].axis("off")
figure.colorbar(drawn, ax=axes, label="standard deviations")
figure.savefig(out / "figure.png", dpi=110)

# %% [markdown]
# `farout score detector/ incoming/ --out results/ --maps` writes such a picture for every image, and shows the
# highest scores with their maps on its page. [patches](../methods/patches.md) says when the maps are reliable;
# `reconstruction` and `denoising` have maps too.
