"""Classifiers: networks from libraries, logits and features in one pass, augmentation, losses, training."""
