# %% [markdown]
# # Score a folder of images
#
# You have a folder of normal images and want to find the new images that differ from them. This example first writes
# two folders of images from the built-in sample: clothes are the normal images, and the new images are clothes and a
# few digits. Use the paths of your own folders in their place.

# %%
import sys
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

import farout

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output/own_folder")
good, incoming = out / "good", out / "incoming"
for folder, source, count in (
    (good, "sample_fashion:train", 300),
    (incoming, "sample_fashion:test", 60),
    (incoming, "sample_digits:test", 12),
):
    folder.mkdir(parents=True, exist_ok=True)
    name = "digit" if "digits" in source else "clothes"
    for number, image in enumerate(farout.open_source(source, limit=count)):
        to_pil_image(image).save(folder / f"{name}-{number:03}.png")

# %% [markdown]
# ## Fit
#
# `fit` divides the images: some train the network, some estimate the statistics of the scores, and some are only used
# for the p-values. 300 updates are enough for a first impression; leave `updates` out for the default.

# %%
detector = farout.Semantic(updates=300).fit(good)
detector.save(out / "detector")

# %% [markdown]
# ## Score
#
# Each image gets a score (higher = more anomalous), a p-value, and a flag `is_ood` (p-value at most `alpha`, by
# default 0.05). On average, one in twenty normal images is flagged as well.

# %%
detector = farout.load(out / "detector")
scores = detector.score(incoming)
table = scores.to_frame().sort_values("score", ascending=False)
print(table[["key", "score", "p_value", "is_ood"]].head(15).to_string(index=False))

is_digit = table["key"].str.startswith("digit")
flagged = table["is_ood"]
print(f"flagged: {flagged[is_digit].mean():.0%} of the digits, {flagged[~is_digit].mean():.0%} of the clothes")

# %%
axes = scores.plot()
axes.figure.savefig(out / "figure.png", dpi=110)

# %% [markdown]
# ## Write a report
#
# `score_folder` does the same for a folder of any size. It writes `scores.csv` and an HTML page with the highest
# scores and the nearest normal images, and continues after an interruption when it is called again.

# %%
farout.score_folder(detector, incoming, out / "results")
print(f"open {out / 'results' / 'page.html'} in a browser")

# %% [markdown]
# The same with commands:
#
#     farout fit semantic good/ --out detector/
#     farout score detector/ incoming/ --out results/
