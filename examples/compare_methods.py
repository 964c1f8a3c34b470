# %% [markdown]
# # Compare methods
#
# Several detectors on the same images: normal images are six classes of the built-in sample of FashionMNIST. Two sets
# of OOD images differ in difficulty: digits, and two classes of clothes that the detectors have not seen.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import farout
from farout.evaluation.intervals import paired_difference
from farout.evaluation.metrics import detection_metrics

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output/compare_methods")
train, test = "sample_fashion:train@classes=0,2,4-7", "sample_fashion:test@classes=0,2,4-7"
ood = {"digits": "sample_digits:test", "new clothes": "sample_fashion:test@classes=1,8"}

# %% [markdown]
# ## Fit and score
#
# All of these detectors work on the same features of a pretrained backbone. The features of an image are computed
# once and stored, so that each further detector takes seconds.

# %%
detectors = {"knn": farout.KNN(), "mahalanobis": farout.Mahalanobis(), "pca": farout.PCA(), "gmm": farout.GMM()}
scores: dict[str, dict[str, farout.Scores]] = {}
for name, detector in detectors.items():
    detector.fit(train, limit=300, statistics=240)
    scores[name] = {source: detector.score(source, limit=100) for source in (test, *ood.values())}

# %% [markdown]
# ## Compare
#
# An AUROC from a hundred images is uncertain, so `detection_metrics` returns it with a 95 % interval.

# %%
rows = []
for name, by_source in scores.items():
    for kind, source in ood.items():
        metrics = detection_metrics(by_source[test].score, by_source[source].score)
        rows.append((name, kind, metrics.auroc, metrics.auroc_low, metrics.auroc_high, metrics.fpr95))
table = pd.DataFrame(rows, columns=["detector", "ood", "auroc", "low", "high", "fpr95"])
out.mkdir(parents=True, exist_ok=True)
table.to_csv(out / "metrics.csv", index=False)
print(table.round(3).to_string(index=False))

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for shift, (kind, part) in zip((-0.1, 0.1), table.groupby("ood", sort=False)):
    errors = [part["auroc"] - part["low"], part["high"] - part["auroc"]]
    positions = [position + shift for position in range(len(part))]
    axes.errorbar(positions, part["auroc"], errors, fmt="o", capsize=3, label=kind)
axes.set(ylabel="AUROC with 95 % interval", xticks=range(len(detectors)), xticklabels=list(detectors))
axes.legend(title="OOD images")
figure.savefig(out / "figure.png", dpi=110)

# %% [markdown]
# Overlapping intervals do not show that two detectors are equal: both scored the same images, so compare them image
# by image. A detector is better than another only if the interval of the difference excludes zero.

# %%
for kind, source in ood.items():
    first, second = scores["knn"], scores["mahalanobis"]
    difference = paired_difference((first[test].score, first[source].score), (second[test].score, second[source].score))
    print(f"{kind}: knn - mahalanobis {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})")

# %% [markdown]
# For a whole comparison use the commands: `farout evaluate` adds baselines that need no model, and `farout bench`
# trains and evaluates many detectors from one YAML file ([chains and benchmarks](../chains-and-benchmarks.md)).
